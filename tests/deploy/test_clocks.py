"""SuperNodes whose clocks are wrong: minutes cost nothing; an hour keeps them out, as an expired certificate does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.bench import TRAINS, WHOLE, assert_is_the_others_model, bench
from tests.deploy.network import why_no_network

REASON = why_no_network()
pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.skipif(shutil.which("cc") is None, reason="another time of day for one process takes a C compiler"),
]
# libfaketime 0.9.10 does not let Python 3.11 sleep, or wait for a lock.
WRONG_CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += atol(getenv("WRONG_BY_S"));
    return failed;
}
time_t time(time_t *seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds) *seconds = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict seconds, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *seconds = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}
"""
HOUR, DAY = 3600, 86400
SIGNATURE, CERTIFICATE = 0, 1  # exit codes: the SuperLink does not take it, and it does not take the SuperLink
REFUSALS = {
    HOUR: (SIGNATURE, "SuperNode terminated gracefully"),  # it does not say why; the SuperLink's log has a 401
    -HOUR: (SIGNATURE, "SuperNode terminated gracefully"),
    2 * DAY: (SIGNATURE, "SuperNode terminated gracefully"),
    -2 * DAY: (CERTIFICATE, "certificate is not yet valid"),
    400 * DAY: (CERTIFICATE, "certificate has expired"),
}


def make_clock(folder: Path) -> Path:
    """Return a library that gives a program another time of day, and no other clock."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(WRONG_CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def test_minutes_cost_nothing_and_an_hour_or_an_expired_certificate_keeps_out(folder: Path, tmp_path: Path) -> None:
    library = make_clock(tmp_path)

    def wrong(by_s: int) -> tuple[str, ...]:
        return ("env", f"LD_PRELOAD={library}", f"WRONG_BY_S={by_s}")

    hosts = {by_s: f"by{by_s}" for by_s in REFUSALS}
    with bench(folder, strangers=tuple(hosts.values())) as made:
        strangers = {by_s: made.start(0, name, host=name, enter=wrong(by_s)) for by_s, name in hosts.items()}
        members = [made.start(0), made.start(1, enter=wrong(-240))]
        done = made.run(tmp_path / "run", WHOLE)
        for by_s, node in strangers.items():
            log, (code, words) = node.log.read_text(), REFUSALS[by_s]
            assert words in log, f"{by_s} s: {log}"
            assert "[RUN " not in log, f"{by_s} s: {log}"
            assert node.process.poll() == code, f"{by_s} s: {log}"
            assert node.wire.down < 20_000, f"{by_s} s: it got {node.wire.down} bytes"
        refused = (folder / "superlink.log").read_text().count('/v1/fleet/activate-node HTTP/1.1" 401')
        assert refused == sum(code == SIGNATURE for code, _ in REFUSALS.values())
        assert all(node.log.read_text().count(TRAINS) == 2 for node in members)
    assert done.failures == []
    assert_is_the_others_model(done, tmp_path / "here", WHOLE)
