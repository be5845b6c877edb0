"""A server of answers as server-sent events; a client that goes away ends its request.

    python examples/langchain/stream_server.py [--model MODEL] [--port PORT]
    curl -N 'localhost:8000/ask?question=Why+is+the+sky+blue%3F'

Needs the packages of the extra `server`.
"""

import argparse
import asyncio
import json
from contextlib import aclosing

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="a folder or a repository id; left out, a small model is fetched")
parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
args = parser.parse_args()

llm = ChatOMLX(model=args.model or str(ensure_sample_model()), max_tokens=80)


async def events(question, options):
    num_sent = 0
    try:
        # Closing the stream is what ends the request.
        async with aclosing(llm.astream(question, **options)) as chunks:
            async for chunk in chunks:
                event = {"text": chunk.text} if chunk.usage_metadata is None else {"usage": chunk.usage_metadata}
                yield f"data: {json.dumps(event)}\n\n"
                num_sent += 1
    except (asyncio.CancelledError, GeneratorExit):
        print(f"a client went away after {num_sent} events", flush=True)
        raise


async def ask(request):
    question, limit = request.query_params["question"], request.query_params.get("max_tokens")
    options = {} if limit is None else {"max_tokens": int(limit)}
    # Starlette cancels what it streams when the client goes away.
    return StreamingResponse(events(question, options), media_type="text/event-stream")


async def active(_):
    """How many requests are being answered."""
    return JSONResponse((await llm.aget_engine()).num_active_requests)


if __name__ == "__main__":
    uvicorn.run(Starlette(routes=[Route("/ask", ask), Route("/active", active)]), port=args.port)
