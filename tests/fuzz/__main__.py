"""`python -m tests.fuzz`: fuzz for minutes or hours. `make fuzz MINUTES=60` does the same.

With atheris (libFuzzer) where it is installed, which sees what code an input reaches; else with changes
drawn from a seed. A finding is written to the folder that is named, and its bytes are a case for
tests/hostile. Memory is looked at as it goes: what an input leaves behind is a finding as well.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    # Before anything of it is imported for the first time.
    with atheris.instrument_imports(include=["proxy", "routing"]):
        from tests.fuzz import targets as _  # noqa: F401 - for what it imports

from tests.fuzz.mutation import INPUT_BYTES_MAX, mutate
from tests.fuzz.seeds import TOKENS, make_seeds
from tests.fuzz.targets import TARGETS

NAMES = list(TARGETS)
# Inputs between two looks at memory, and before the first: caches are full by then.
LOOK_EVERY = 20_000
# Objects that may come and go with what a cache holds; an object left by each input would be thousands.
OBJECTS_MAX = 8_000
# An input takes a millisecond; one that takes this long hangs.
INPUT_SECONDS_MAX = 20


class Run:
    """Counts inputs, and looks at memory between them."""

    def __init__(self) -> None:
        self.inputs = dict.fromkeys(NAMES, 0)
        self.objects = 0  # after the second look
        self.peak_kb = 0
        self.started = time.monotonic()

    @property
    def count(self) -> int:
        return sum(self.inputs.values())

    def one(self, data: bytes) -> None:
        """Give one input to the target that its first byte names."""
        name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
        self.inputs[name] += 1
        TARGETS[name](data[1:])
        if self.count % LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        gc.collect()
        objects = len(gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        resident_kb = pages * resource.getpagesize() // 1024
        self.peak_kb = max(self.peak_kb, resident_kb)
        if self.count == 2 * LOOK_EVERY:
            self.objects = objects
        assert not self.objects or objects < self.objects + OBJECTS_MAX, (
            f"{objects} objects, were {self.objects}"
        )
        rate = self.count / (time.monotonic() - self.started)
        print(f"{self.count} inputs, {rate:.0f}/s, {objects} objects, {resident_kb // 1024} MiB", flush=True)

    def report(self) -> None:
        minutes = (time.monotonic() - self.started) / 60
        print(
            f"{self.count} inputs in {minutes:.1f} min, at most {self.peak_kb // 1024} MiB:",
            self.inputs,
            flush=True,
        )


def fuzz_with_mutation(run: Run, seed: int, minutes: float, findings: Path) -> None:
    """Change what the seeds are, at random."""
    seeds, rng = make_seeds(), random.Random(seed)
    print(f"seed {seed}; atheris is not installed, so nothing guides the changes")
    end = time.monotonic() + minutes * 60

    def hang(*_: object) -> None:
        raise TimeoutError(f"an input takes longer than {INPUT_SECONDS_MAX} s")

    signal.signal(signal.SIGALRM, hang)
    while time.monotonic() < end:
        index = rng.randrange(len(NAMES))
        data = bytes((index,)) + mutate(rng, seeds[NAMES[index]])
        signal.alarm(INPUT_SECONDS_MAX)
        try:
            run.one(data)
        except BaseException:
            (findings / f"crash-{run.count}").write_bytes(data)
            print(f"finding of {NAMES[index]}: {data!r}")
            raise
    signal.alarm(0)
    run.report()


def fuzz_with_coverage(run: Run, seed: int, minutes: float, findings: Path) -> None:
    """Let libFuzzer look for inputs that reach new code; it ends the process itself."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-fuzz-"))
    corpus, tokens = folder / "corpus", folder / "tokens"
    corpus.mkdir()
    for index, name in enumerate(NAMES):
        for number, raw in enumerate(make_seeds()[name]):
            (corpus / f"{name}-{number}").write_bytes(bytes((index,)) + raw)
    tokens.write_text("".join(f'"{quote(token)}"\n' for token in TOKENS), "ascii")
    end = time.monotonic() + minutes * 60

    def one(data: bytes) -> None:
        run.one(data)
        if time.monotonic() > end:
            run.report()
            shutil.rmtree(folder)
            os._exit(0)

    options = [
        *(f"-seed={seed}", f"-dict={tokens}", f"-max_len={INPUT_BYTES_MAX}", f"-timeout={INPUT_SECONDS_MAX}"),
        *(f"-artifact_prefix={findings}/", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"),
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def quote(token: bytes) -> str:
    """Write bytes as libFuzzer's dictionaries have them."""
    return "".join(f"\\x{byte:02x}" for byte in token)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="drawn when it is not given")
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"), help="where findings are written")
    parser.add_argument("--plain", action="store_true", help="without atheris, also where it is installed")
    parser.add_argument("inputs", nargs="*", type=Path, help="findings to run again, instead of fuzzing")
    given = parser.parse_args()
    run = Run()
    if given.inputs:
        for path in given.inputs:
            run.one(path.read_bytes())
        return
    given.findings.mkdir(exist_ok=True)
    seed = given.seed if given.seed is not None else random.randrange(1, 2**31)
    fuzz = fuzz_with_mutation if atheris is None or given.plain else fuzz_with_coverage
    fuzz(run, seed, given.minutes, given.findings)


if __name__ == "__main__":
    main()
