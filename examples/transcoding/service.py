"""
A transcoding service around ffmpeg, as anybody might write it: it knows nothing of any proxy.

    POST /transcode            a clip in, a smaller one out, when it is done
    POST /submit               a clip in, {"task_id": ...} at once
    GET  /status/{id}          {"state": "running" | "finished" | "failed"}
    GET  /result/{id}          the clip

One job is all that a pod can do well; nothing here keeps it from getting more.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

FOLDER = Path(tempfile.mkdtemp(prefix="transcoding-"))
states: dict[str, str] = {}
working = most = 0


async def receive(request: Request) -> Path:
    """Store the clip that a request brings."""
    clip = FOLDER / f"{uuid.uuid4().hex}.in"
    with clip.open("wb") as file:
        async for piece in request.stream():
            file.write(piece)
    return clip


async def transcode(clip: Path) -> Path | None:
    """Make a clip half as wide, in H.264; None if it is no clip."""
    global working, most
    working += 1
    most = max(most, working)
    out = clip.with_suffix(".mp4")
    command = ["-y", "-loglevel", "error", "-i", clip, "-vf", "scale=trunc(iw/4)*2:-2"]
    process = await asyncio.create_subprocess_exec(
        "ffmpeg", *command, "-c:v", "libx264", "-preset", "veryfast", out
    )
    failed = await process.wait()
    working -= 1
    clip.unlink()
    return None if failed else out


async def synchronous(request: Request) -> Response:
    """Answer when the clip is done."""
    out = await transcode(await receive(request))
    if out is None:
        return JSONResponse({"error": "this is no clip"}, 422)
    return FileResponse(out, media_type="video/mp4", background=BackgroundTask(out.unlink))


async def submit(request: Request) -> Response:
    """Answer at once; the work goes on."""
    clip = await receive(request)
    job = clip.stem
    states[job] = "running"

    async def work() -> None:
        states[job] = "failed" if await transcode(clip) is None else "finished"

    return JSONResponse({"task_id": job}, 202, background=BackgroundTask(work))


async def status(request: Request) -> Response:
    """Tell how a job is."""
    state = states.get(request.path_params["job"])
    return JSONResponse({"state": state}) if state else JSONResponse({"error": "unknown"}, 404)


async def result(request: Request) -> Response:
    """Return what came of a job."""
    job = request.path_params["job"]
    if states.get(job) != "finished":
        return JSONResponse({"error": "there is no result"}, 404)
    return FileResponse(FOLDER / f"{job}.mp4", media_type="video/mp4")


async def stats(_: Request) -> Response:
    """Tell how many clips were worked on at once, at most."""
    return JSONResponse({"most": most, "working": working})


app = Starlette(
    routes=[
        Route("/transcode", synchronous, methods=["POST"]),
        Route("/submit", submit, methods=["POST"]),
        Route("/status/{job}", status),
        Route("/result/{job}", result),
        Route("/stats", stats),
    ]
)
