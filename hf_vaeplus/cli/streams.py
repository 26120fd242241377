"""Standard output and error of a command: they outlive their reader and take every character."""

import errno
import io
import os
import sys


class LastingStream(io.TextIOWrapper):
    """A stream that goes on into nothing once it cannot be written, so that no work ends because nobody reads of it.

    That is so when its reader has gone away, its terminal is closed, or its disk is full.

    Attributes:
        lost (`OSError`, *optional*): why it could not be written.
    """

    lost = None

    def write(self, text):
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self):
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error):
        self.lost = self.lost or error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())  # what libraries write by themselves goes there as well
        os.close(nothing)


def make_streams_last():
    """Replace `sys.stdout` and `sys.stderr` of this process, unless something else has replaced them already."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the process began: the next file that is opened would get its number
            stream = LastingStream(open(os.devnull, "wb"), encoding="utf-8")
            stream.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
            setattr(sys, name, stream)
        elif type(stream) is io.TextIOWrapper:
            lasting = LastingStream(
                stream.buffer,
                stream.encoding,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            lasting.replaced = stream  # if it went, it would close the buffer
            setattr(sys, name, lasting)


def escape_unknown_characters():
    """A terminal that knows only ASCII, and the name of a file that is no UTF-8, give escapes and no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def lost_output() -> OSError | None:
    """Why not all of the standard output could be written, if so."""
    if not isinstance(sys.stdout, LastingStream):
        return None
    sys.stdout.flush()
    return sys.stdout.lost
