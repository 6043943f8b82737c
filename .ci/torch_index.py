"""Print the pip option that gets torch without CUDA on Linux, when the index that has it answers.

pip would retry an unreachable extra index for every package, so it is asked once here, with a short timeout. Without an
answer nothing is printed and torch comes from wherever pip is set up to look. KVPLAN_TORCH=default skips the question.
"""

import os
import sys
import urllib.request

INDEX = "https://download.pytorch.org/whl/cpu"
TIMEOUT_S = 5.0


def answers(index: str) -> bool:
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=TIMEOUT_S) as reply:
            return bool(reply.status == 200 and reply.read(64))
    except Exception:
        return False


if __name__ == "__main__":
    if sys.platform.startswith("linux") and os.environ.get("KVPLAN_TORCH") != "default":
        if answers(INDEX):
            print(f"--extra-index-url {INDEX}")
        else:
            print(f"{INDEX} does not answer; torch comes from pip's own index", file=sys.stderr)
