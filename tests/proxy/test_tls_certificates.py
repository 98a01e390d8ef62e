from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.certificates import CONTEXTS_MAX, Certificates, Found, find_pairs
from tests.fakes.site_certificates import SiteAuthority

if TYPE_CHECKING:
    from pathlib import Path

AUTHORITY = SiteAuthority()


def found_in(*sources: Path | str, before: Found | None = None) -> Found:
    return find_pairs([str(source) for source in sources], before or Found(), time.time())


def test_directory_is_read_in_each_of_its_forms(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "beside.test")
    cert, key = AUTHORITY.issue("within.test")
    (tmp_path / "within.pem").write_text(key + cert)
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "fullchain.pem").write_text(AUTHORITY.issue("x")[0])
    cert, key = AUTHORITY.issue("certbot.test", "*.certbot.test")
    (tmp_path / "live" / "fullchain.pem").write_text(cert + AUTHORITY.pem)
    (tmp_path / "live" / "privkey.pem").write_text(key)
    (tmp_path / "README").write_text("not ours")
    found = found_in(tmp_path)
    assert set(found.names) == {"beside.test", "within.test", "certbot.test", "*.certbot.test"}
    assert not found.problems
    assert found.default is None


def test_certificate_and_key_may_be_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(AUTHORITY.issue("a.test")[0])
    cert, key = AUTHORITY.issue("a.test", "192.0.2.1")
    (tmp_path / "a").write_text(cert)
    (tmp_path / "b").write_text(key)
    found = found_in(f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert set(found.names) == {"a.test", "192.0.2.1"}
    assert found.default is found.names["a.test"]


def test_of_two_certificates_for_a_name_the_one_that_is_good_for_longer_is_used(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "a.test", file="1", days=10)
    longer = AUTHORITY.write(tmp_path, "a.test", file="2", days=20)
    AUTHORITY.write(tmp_path, "a.test", file="3", days=15)
    assert found_in(tmp_path).names["a.test"].source == str(longer)


def weak_pair() -> tuple[str, str]:
    return AUTHORITY.issue("a.test", key=rsa.generate_private_key(65_537, 1_024))


BAD = {
    "mismatch": (lambda: (AUTHORITY.issue("a.test")[0], AUTHORITY.issue("a.test")[1]), "is not that of"),
    "empty": (lambda: ("", AUTHORITY.issue("a.test")[1]), "no certificate"),
    "no key": (lambda: (AUTHORITY.issue("a.test")[0], ""), "no usable key"),
    "cut": (lambda: (AUTHORITY.issue("a.test")[0][:200], AUTHORITY.issue("a.test")[1]), "no certificate"),
    "expired": (lambda: AUTHORITY.issue("a.test", begin=-9, days=1), "expired"),
    "weak": (weak_pair, "small"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_new_files_leave_the_last_good_certificate_in_use(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = AUTHORITY.write(tmp_path, "a.test")
    good = found_in(tmp_path)
    make, reason = BAD[fault]
    cert, key = make()
    path.write_text(cert)
    path.with_suffix(".key").write_text(key)
    bad = found_in(tmp_path, before=good)
    again = found_in(tmp_path, before=bad)
    for found in (bad, again):
        assert found.names["a.test"] == good.names["a.test"]
        assert reason in found.problems[str(path)]
    assert [record.getMessage() for record in caplog.records] == ["a certificate cannot be used"]
    AUTHORITY.write(tmp_path, "a.test", days=60)
    mended = found_in(tmp_path, before=again)
    assert not mended.problems
    assert mended.names["a.test"].expires_s > good.names["a.test"].expires_s


def test_unreadable_file_leaves_the_last_good_certificate_in_use(tmp_path: Path) -> None:
    path = AUTHORITY.write(tmp_path, "a.test")
    good = found_in(tmp_path)
    path.with_suffix(".key").unlink()
    path.with_suffix(".key").mkdir()
    bad = found_in(tmp_path, before=good)
    assert bad.names["a.test"] == good.names["a.test"]
    assert "cannot read" in bad.problems[str(path)]


def test_expired_certificate_is_better_than_none(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "a.test", begin=-9, days=1)
    assert "a.test" in found_in(tmp_path).names


def test_file_that_is_gone_takes_its_names_with_it(tmp_path: Path) -> None:
    path = AUTHORITY.write(tmp_path, "a.test")
    AUTHORITY.write(tmp_path, "b.test")
    before = found_in(tmp_path)
    path.unlink()
    assert set(found_in(tmp_path, before=before).names) == {"b.test"}


def test_files_that_did_not_change_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AUTHORITY.write(tmp_path, "a.test")
    before = found_in(tmp_path)
    monkeypatch.setattr("proxy.certificates.load_pair", lambda *_: pytest.fail("read again"))
    assert found_in(tmp_path, before=before).pairs == before.pairs


def test_replaced_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = AUTHORITY.write(tmp_path, "a.test")
    before = found_in(tmp_path)
    status = path.stat()
    for suffix, text in zip((".crt", ".key"), AUTHORITY.issue("b.test"), strict=True):
        new = tmp_path / "new"
        new.write_text(text)
        os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
        new.rename(path.with_suffix(suffix))
    assert set(found_in(tmp_path, before=before).names) == {"b.test"}


async def test_change_is_taken_up_while_it_runs_and_at_once_when_told(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "a.test")
    certificates = Certificates([str(tmp_path)], time.time)
    certificates.load()
    watching = asyncio.create_task(certificates.watch(3_600))
    AUTHORITY.write(tmp_path, "b.test")
    certificates.reload()
    async with asyncio.timeout(5):
        while certificates.find("b.test") is None:  # noqa: ASYNC110 - it is read in a thread
            await asyncio.sleep(0.001)
    watching.cancel()
    watching = asyncio.create_task(certificates.watch(0.001))
    AUTHORITY.write(tmp_path, "c.test")
    async with asyncio.timeout(5):
        while certificates.find("c.test") is None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
    watching.cancel()


def test_contexts_are_made_once_and_the_ones_used_last_are_kept(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "a.test")
    AUTHORITY.write(tmp_path, "b.test")
    certificates = Certificates([str(tmp_path)], time.time)
    certificates.load()
    a, b = certificates.find("a.test"), certificates.find("b.test")
    assert a is not None
    assert b is not None
    context = certificates.context(a)
    others = [(str(i), certificates.context(b)) for i in range(CONTEXTS_MAX - 2)]
    certificates._contexts.update((name, (b, one)) for name, one in others)
    assert certificates.context(a) is context
    certificates._contexts["more"] = certificates._contexts["0"]
    certificates._contexts.pop(b.source)
    certificates.context(b)
    assert len(certificates._contexts) == CONTEXTS_MAX
    assert certificates.context(a) is context


def test_samples_name_the_certificates_that_expire_first(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path, "late.test", "www.late.test", days=60)
    AUTHORITY.write(tmp_path, "early.test", days=10)
    (tmp_path / "bad.crt").write_text("")
    certificates = Certificates([str(tmp_path)], time.time)
    certificates.load()
    samples = {(name, dict(labels).get("name")): value for name, labels, value in certificates.samples()}
    assert samples["isthmus_tls_certificates", None] == 2
    assert samples["isthmus_tls_certificates_refused", None] == 1
    expiry = "isthmus_tls_certificate_expiry_seconds"
    early, late = samples[expiry, "early.test"], samples[expiry, "late.test"]
    assert (late - early) / 86_400 == pytest.approx(50, abs=0.1)
    assert early == pytest.approx(time.time() + 9 * 86_400, abs=60)


async def test_ten_thousand_names_are_found_each_with_its_certificate(tmp_path: Path) -> None:
    for i in range(100):
        AUTHORITY.write(tmp_path, *(f"n{j}.site{i}.test" for j in range(99)), f"*.site{i}.test", file=str(i))
    certificates = Certificates([str(tmp_path)], time.time)
    assert certificates.load() is None
    for i in range(100):
        pairs = {id(certificates.find(f"n{j}.site{i}.test")) for j in range(120)}
        assert len(pairs) == 1
        pair = certificates.find(f"n0.site{i}.test")
        assert pair is not None
        assert pair.source == str(tmp_path / f"{i}.crt")
    assert certificates.find("site0.test") is None
