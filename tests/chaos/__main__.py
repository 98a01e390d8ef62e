"""`make chaos`: kill a writer some hundred times; a seed that fails is printed and can be given again."""

import argparse
import asyncio
import secrets
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from tests.chaos.killing import Killing

KILLS_A_FILE = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    args = parser.parse_args()
    kills: Counter[str] = Counter()
    began = time.monotonic()
    for number, left in enumerate(range(args.kills, 0, -KILLS_A_FILE)):
        seed, count = args.seed + number, min(left, KILLS_A_FILE)
        print(f"seed {seed}: {count} kills", flush=True)
        with tempfile.TemporaryDirectory() as directory, closing(Killing(Path(directory), seed)) as killing:
            asyncio.run(killing.run(count))
            told = killing.acknowledged
            print(f"  {told.head} versions, {len(told.merged)} changesets of others acknowledged, none lost")
            kills += killing.kills
    moments = ", ".join(f"{times} in {moment}" for moment, times in kills.most_common())
    print(f"{kills.total()} kills in {time.monotonic() - began:.0f} s: {moments}")


if __name__ == "__main__":
    main()
