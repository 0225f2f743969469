"""A party's own process: NVFlare's server or site, which a signal ends with a word on how to go on.

Run as ``python -m unfed.app.party MODULE ARGUMENT...``. NVFlare itself handles no signal. Its job processes notice
within a second or two that their parent is gone and end the job; what a run has saved by then is whole.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from unfed.base.stopping import STOPS

SECONDS = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "60", "NVFLARE_STREAMING_RETRY_TIMEOUT": "30"}
"""NVFlare's own, where the environment does not say otherwise. The first: how long the server waits, once the rounds
are over, for each site to say how its part ended; with 15 minutes a lost site would keep the next job waiting. The
second: how long an answer is sent again, and remembered by whoever got it, at the cost of a thread; with 60 the
server has a thousand of them at 100 MB a round."""
WORDS = {
    "server": "A run that was under way goes on from its last finished round once server and sites are there again: "
    "the same unfed network submit with resume=true",
    "site": "A run that was under way goes on without this site, or ends; started again, it takes part in the next job",
}


def _end(number: int, _frame: FrameType | None) -> None:
    name, role = signal.Signals(number).name, "server" if "server_train" in sys.argv[0] else "site"
    os.write(sys.stderr.fileno(), f"stopped by {name}. {WORDS[role]}\n".encode())
    os._exit(128 + number)  # as without a handler: threads of NVFlare's would keep the process


def main(argv: Sequence[str]) -> None:
    """Run NVFlare's module as the main program."""
    module, *rest = argv
    os.environ.update({name: seconds for name, seconds in SECONDS.items() if name not in os.environ})
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
