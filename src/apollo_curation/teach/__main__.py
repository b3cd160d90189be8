"""`python -m apollo_curation.teach`: the teacher beside a server, for jobs that come by HTTP.

Ended at any point, however, it leaves what the next one goes on with.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import closing
from pathlib import Path

from apollo_curation.settings import load_curation_config
from apollo_curation.teach.run import serve_for_ever
from apollo_ipc.errors import ApolloError
from apollo_ipc.teaching.store import TeachStore, store_path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_curation.teach", description=__doc__)
    parser.add_argument("--config", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s teacher: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = load_curation_config(options.config)
        with closing(TeachStore(store_path(config))) as store:
            serve_for_ever(config, store, logging.getLogger("apollo.teacher").info)
    except ApolloError as error:
        print(f"apollo-ipc: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
