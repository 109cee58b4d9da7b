"""latentrt inside a service: `engine.AsyncEngine` in process. It batches what can share a call.

async with AsyncEngine(pipe) as engine:
    result = await engine.generate(ImageRequest("a red circle above a blue square", seed=0))
"""
