"""`python -m fastllm.entrypoints.api_server --model MODEL`: the same server as `fastllm serve`."""

import sys

from fastllm.server.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m fastllm.entrypoints.api_server"))
