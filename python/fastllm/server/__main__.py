"""`python -m fastllm.server --model MODEL`."""

import sys

from fastllm.server.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m fastllm.server"))
