"""A process of its own that asks an engine: reads requests from standard input, prints results, one JSON a line.

    python ask_engine.py MODEL '{"paged_ssd_cache_dir": …}'

A request is ``{"prompt": …, "options": {…}}`` or ``{"flush": true}``.
"""

import dataclasses
import json
import sys

from omlx_core import CacheSettings, Engine

with Engine.from_pretrained(sys.argv[1], cache=CacheSettings(**json.loads(sys.argv[2]))) as engine:
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("flush"):
            answer = {"flushed": engine.cache.flush(timeout_s=60)}
        else:
            answer = dataclasses.asdict(engine.generate(request["prompt"], **request["options"]))
        print(json.dumps(answer), flush=True)
