"""One tree of exceptions for the whole project.

::

    OMLXError
    ├── InvalidRequestError (ValueError)      what the caller asked for can't be done; nothing has changed
    │   ├── InvalidPromptError                empty, not token ids, not messages, beyond the context
    │   ├── InvalidParameterError             a sampling value out of range
    │   ├── InvalidConstraintError            a schema, pattern or grammar that can't be followed
    │   ├── InvalidToolError                  a tool, or the choice of one, that can't be used
    │   ├── MissingBlocksError (LookupError)  blocks to be exported are not on disk
    │   ├── ForeignExportError                an exported prefix belongs to another model
    │   └── UnknownParameterError (TypeError) a keyword that doesn't exist
    ├── InvalidSettingError (ValueError)      a size, a path or a combination of settings
    │   └── CacheDirectoryError (OSError)     the SSD tier's folder can't be created or written
    ├── ModelNotFoundError (FileNotFoundError)
    ├── ModelLoadError (RuntimeError)
    ├── MissingDependencyError (ImportError)  an extra or a platform backend isn't installed
    ├── UnknownPluginError (LookupError)
    ├── EngineClosedError (RuntimeError)
    ├── EngineForkedError (RuntimeError)      the engine was made in another process
    ├── EngineBusyError (RuntimeError)        too many requests wait in line
    ├── RequestCancelledError (RuntimeError)  the request was cancelled before it was answered
    ├── RequestTimeoutError (TimeoutError)    the request took longer than it was given
    ├── UnknownModelError (LookupError)       a pool has no model of that name
    ├── ModelMemoryError (MemoryError)        a model doesn't fit what a pool may take
    ├── EngineError (RuntimeError)            a request failed inside the engine
    │   └── UnmetConstraintError              an answer could not go on as its constraint asks
    ├── UnusableAnswerError (ValueError)      a whole answer isn't what was to be made of it
    ├── BlockPoolExhaustedError (MemoryError) every block is in use and the pool may not grow
    ├── BlockFileError (OSError)              a block file could not be read or written
    │   └── CorruptBlockError                 its content is not what was written
    └── CacheInvariantError (AssertionError)  a defect of this project: please report it

Every message names the value, the limit and the way out. A cache miss is a result, never an exception, and
`BlockFileError` never reaches a caller of the engine: a failing disk costs time, not answers.
"""

from __future__ import annotations


class OMLXError(Exception):
    """Base of all errors that this project raises on purpose."""


class InvalidRequestError(OMLXError, ValueError):
    """The request can't be served as asked; nothing has changed."""


class InvalidPromptError(InvalidRequestError):
    """The prompt is empty, malformed, or longer than the model's context."""


class InvalidParameterError(InvalidRequestError):
    """A generation parameter is out of its range."""


class InvalidConstraintError(InvalidRequestError):
    """A schema, a pattern or a grammar can't be followed."""


class InvalidToolError(InvalidRequestError):
    """A tool, or the choice of one, can't be used."""


class UnknownParameterError(InvalidRequestError, TypeError):
    """A generation parameter of that name doesn't exist."""


class MissingBlocksError(InvalidRequestError, LookupError):
    """Blocks that should be exported are not on disk."""


class ForeignExportError(InvalidRequestError):
    """An exported prefix belongs to another model, or to the same one kept in another way."""


class InvalidSettingError(OMLXError, ValueError):
    """A setting can't be understood or doesn't fit the others."""


class CacheDirectoryError(InvalidSettingError, OSError):
    """The folder of the SSD tier can't be created or written."""


class ModelNotFoundError(OMLXError, FileNotFoundError):
    """There is no model at that path or repository id."""


class ModelLoadError(OMLXError, RuntimeError):
    """The model's files are there but could not be loaded."""


class MissingDependencyError(OMLXError, ImportError):
    """An optional dependency or a platform backend isn't installed."""


class UnknownPluginError(OMLXError, LookupError):
    """No plugin registered an adapter of that name."""


class EngineClosedError(OMLXError, RuntimeError):
    """The engine was closed before or while the request ran."""


class RequestCancelledError(OMLXError, RuntimeError):
    """The request was cancelled before it was answered."""


class EngineForkedError(OMLXError, RuntimeError):
    """The engine was made in another process: threads and device memory don't survive a fork."""


class EngineBusyError(OMLXError, RuntimeError):
    """As many requests as are allowed wait in line already."""


class RequestTimeoutError(OMLXError, TimeoutError):
    """The request took longer than its `timeout_s`."""


class UnknownModelError(OMLXError, LookupError):
    """A pool has no model of that name."""


class ModelMemoryError(OMLXError, MemoryError):
    """A model doesn't fit into what a pool may take, even with all others unloaded that may be."""


class EngineError(OMLXError, RuntimeError):
    """A request failed inside the engine; `__cause__` says why."""


class UnmetConstraintError(EngineError):
    """An answer could not be continued in a way that its constraint allows."""


class UnusableAnswerError(OMLXError, ValueError):
    """An answer isn't what was to be made of it: JSON that was cut off, or text where a call must be."""


class BlockPoolExhaustedError(OMLXError, MemoryError):
    """Every block is in use and the pool may not grow."""


class BlockFileError(OMLXError, OSError):
    """A block file could not be read or written."""


class CorruptBlockError(BlockFileError):
    """A block file's content is not what was written."""


class CacheInvariantError(OMLXError, AssertionError):
    """An invariant of the cache is broken: a defect of this project."""
