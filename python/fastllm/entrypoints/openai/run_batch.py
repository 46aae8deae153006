"""`python -m fastllm.entrypoints.openai.run_batch -i FILE -o FILE --model MODEL`: the same as `fastllm run-batch`."""

import sys

from fastllm.server.batch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m fastllm.entrypoints.openai.run_batch"))
