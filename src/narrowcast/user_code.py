"""Code that users wrote: when it raises, they see their own lines and none of ours or torch's.

Every call into a recipe or a dataset stands in a ``with user_code(...)`` block. What escapes it is
one of our errors, whose message ends in the user's part of the traceback; the original exception
stays attached as ``__cause__`` for whoever wants it whole.
"""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

from narrowcast.errors import NarrowcastError, RecipeError

__all__ = ["user_code", "user_traceback"]

_OURS = Path(__file__).resolve().parent


class user_code:  # noqa: N801 -- a context manager, read as a verb
    """Turn whatever the block raises into an error of `kind` with the user's own traceback.

    `doing` finishes the sentence "<file>: <doing> raised ...". Our own errors and Ctrl-C pass;
    a call of ``sys.exit`` does not, since a training that ends without a word would look finished.
    """

    __slots__ = ("doing", "hint", "kind", "path")

    def __init__(
        self,
        path: Path | None,
        doing: str,
        *,
        kind: type[NarrowcastError] = RecipeError,
        hint: str = "",
    ) -> None:
        self.path, self.doing, self.kind, self.hint = path, doing, kind, hint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, NarrowcastError) or not isinstance(error, (Exception, SystemExit)):
            return
        where = f"{self.path.name}: " if self.path else ""
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        lines = user_traceback(error, self.path)
        raise self.kind(
            f"{where}{self.doing} raised {what}" + (f"\n{lines}" if lines else ""),
            hint=self.hint or _hint(error),
        ) from error


def user_traceback(error: BaseException, path: Path | None) -> str:
    """Format the frames of an error that lie in the user's files.

    These are the file `path` and its neighbours, or without a path all but installed libraries and
    narrowcast. A syntax error, which has no frame of its own, shows its line and the place in it.
    """
    if isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error)[:-1]).rstrip()
    linecache.checkcache()  # the file may have been edited since an earlier traceback
    frames = traceback.extract_tb(error.__traceback__)
    kept = [frame for frame in frames if _is_users(frame.filename, path)]
    return "".join(traceback.StackSummary.from_list(kept).format()).rstrip()


def _is_users(filename: str, path: Path | None) -> bool:
    if path is not None and filename == str(path):
        return True
    file = Path(filename).resolve()
    if filename.startswith("<") or (path is not None and not file.is_relative_to(path.parent)):
        return False
    # Asked for here and not at import: it is needed only once something has gone wrong.
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    libraries = (_OURS, *(Path(place).resolve() for place in installed))
    return not any(file.is_relative_to(library) for library in libraries)


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "take less at once: --set batch_size=... or a smaller model"
    if "could not create a primitive" in str(error):
        # What oneDNN says, for instance, of training an LSTM in fp16 (torch 2.13 on a CPU).
        return "the CPU has no kernel for this layer in this precision: try bf16 or fp32"
    if "not support sparse gradients" in str(error):
        return (
            "build the embedding with sparse=False, or define optimizer(model, options) and return "
            "one that takes sparse gradients, such as SGD or Adagrad: a recipe without it gets "
            "AdamW, which takes none"
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install what provides {error.name!r} in the environment that narrowcast runs in"
    return ""
