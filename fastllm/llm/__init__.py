"""Training and evaluating language models and classifiers on the kernels: the commands that need the `llm` extra."""

import importlib


def require(module: str, package: str | None = None, extra: str | None = "llm"):
    """Import a third-party module that only an extra brings, or none does. Raises ImportError that names the cure."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or module
        cure = f"'fastllm-kernels[{extra}]', or {package}" if extra else package
        raise ImportError(f"{package} is needed here: pip install {cure}") from error
