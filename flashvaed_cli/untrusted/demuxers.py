"""Which container formats FFmpeg may try on a file: only those that contain their own pictures. Imports nothing.

Without a list FFmpeg goes by content alone, and a text file called `clip.mp4` can be a playlist
(ffconcat, HLS, DASH) that reads other files and addresses.
"""

from __future__ import annotations

_STILLS = "png_pipe jpeg_pipe mjpeg webp_pipe bmp_pipe tiff_pipe"
_VIDEOS = "mov mp4 matroska webm avi mpegts mpeg mpegvideo m4v h264 hevc gif apng yuv4mpegpipe asf flv ogg"


def _options(formats: str) -> dict[str, str]:
    return {"format_whitelist": ",".join(formats.split()), "protocol_whitelist": "file"}


VIDEO_OPTIONS = _options(f"{_VIDEOS} {_STILLS}")
"""For `av.open(f"file:{path}", options=VIDEO_OPTIONS)`."""

STILL_OPTIONS = _options(f"{_STILLS} image2")
"""For files opened in Python and passed on: given a name, image2 would take a `%` for a pattern."""
