"""latentrt inside a service: `engine.AsyncEngine`, in process, batches requests that can share a call.

async with AsyncEngine(pipe) as engine:
    result = await engine.generate(ImageRequest("a red circle above a blue square", seed=0))

Over HTTP a request passes, from the socket to the device:
    server, connection      uvicorn, with bounds on connections and on how long they take
    middleware              an id, a host (hosts), a key (keys), a bound on the body, a log line (logs), a count
                            (metrics)
    app                     OpenAI's images API: what is posted (schema), what is answered (answers), and both
                            described (description)
    service                 the engine's life: loading, ready, draining, gone
    engine                  requests (requests) become jobs (jobs), and batches leave for the device
    admission, scheduler    who may wait, by how long calls take (call_times); who is next
    worker > runner         the thread that owns the device; the pipeline as it sees it
With Ray (ray.md):
    ray_app, ray_local      the application; on this machine alone
    ingress, retries        before the replicas: seeds, and one answer where replicas are lost
    hosted                  in a replica: the same `app` without a socket
`commands` is what `latentrt serve` runs.
"""
