"""Ray Serve as a process: `python ray_server.py JSON`, the fields of `Deployed`; its log tells the address."""

from __future__ import annotations

import json
import sys

from latentrt.runtime.serve.hosted import Deployed
from latentrt.runtime.serve.logs import log_as_json
from latentrt.runtime.serve.ray_local import run

if __name__ == "__main__":
    log_as_json()
    run(Deployed.of(json.loads(sys.argv[1])), host="127.0.0.1", port=0)
