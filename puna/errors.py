"""The exceptions that Puna raises on purpose.

Each message names what was received, what was expected and what to do about it.
"""


class PunaError(Exception):
    """The base of every exception that Puna raises on purpose."""


class ConfigError(PunaError, ValueError):
    """A configuration asks for something that is not there or that we do not compute."""


class PresetError(PunaError, ValueError):
    """A preset cannot be found, or its files are missing, broken or contradict each other."""


class TokenizerError(PunaError, ValueError):
    """A tokenizer cannot be read, or does not fit what is asked of it."""


class TemplateError(PunaError, ValueError):
    """A chat template is missing or refuses the conversation."""


class ContextLengthError(PunaError, ValueError):
    """A prompt, or a prompt and its completion, does not fit in the model's context."""


class BackendError(PunaError, RuntimeError):
    """The Keras backend in use cannot do what is asked, or none is installed."""


class DataError(PunaError, ValueError):
    """Rows of training data cannot be read, are of no known kind, or do not fit."""


class RunError(PunaError, RuntimeError):
    """A fine-tuning run cannot begin where it is told to, or cannot go on."""


class StoppedError(PunaError, RuntimeError):
    """A fine-tuning run was interrupted; its checkpoint is written, and it can go on."""


class HostError(PunaError, RuntimeError):
    """Another process of the same work has failed, has ended or does something else."""
