"""What the entry points share: free text on the command line, strict configs, errors as one sentence."""

import dataclasses
import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
import hydra.utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from higgs.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Schema = TypeVar("Schema")
QUOTED = r"""'[^'\\]*'|"[^"\\]*"|null"""


def quote_free_text(arguments: list[str], keys: set[str]) -> list[str]:
    """Quotes the values of `keys`, so that a sentence with commas, colons and brackets is not read as Hydra syntax.

    A value that is one quoted string already, or empty, or null, stays, and so does a list of sources for `data.train` or
    `data.valid`. `${` is escaped, since text holds no interpolations.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        structured = key.startswith("data.") and value.startswith(("[", "{"))
        if key in keys and equals and value and not structured and not re.fullmatch(QUOTED, value, re.DOTALL):
            # A backslash counts only before what it can escape: `${` for OmegaConf, a quote for Hydra.
            value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
            value = re.sub(r"(\\*)'", r"\1\1\\'", value)
            value = re.sub(r"(\\+)\Z", r"\1\1", value)
            argument = f"{key}='{value}'"
        quoted.append(argument)
    return quoted


def compose(config_name: str, overrides: list[str], folder: Path = CONFIGS) -> DictConfig:
    """A config composed outside a Hydra main; a mistake is one sentence.

    Raises:
        UserError: saying which key or option does not exist, with a suggestion.
    """
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, config_name, folder)) from error
    finally:
        GlobalHydra.instance().clear()


def check_overrides(config_name: str, arguments: list[str]) -> None:
    """Composes the config once before Hydra's own start, so that a mistake is one sentence and not a page.

    Of a sweep, the first value of every key is looked at.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        if sweeping(arguments):
            overrides = [first_choice(one) for one in OverridesParser.create().parse_overrides(overrides)]
    except HydraException as error:
        raise UserError(explain(error, config_name)) from error
    compose(config_name, overrides)


def sweeping(arguments: list[str]) -> bool:
    return any(argument in ("-m", "--multirun") for argument in arguments)


def first_choice(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line
    key = override.input_line.partition("=")[0]
    return f"{key}={next(iter(override.sweep_string_iterator()))}"


def name_by_swept(arguments: list[str]) -> str:
    """The override that keeps out of a run's name (`override_dirname`) what all runs of the sweep share."""
    given = OverridesParser.create().parse_overrides([one for one in arguments if not one.startswith("-")])
    shared = [one.key_or_group for one in given if not one.is_sweep_override()]
    return f"hydra.job.config.override_dirname.exclude_keys=[{','.join(shared)}]"


def sweep_folder(run_dir: str) -> str:
    """Where one run of a sweep goes: below `run_dir`, named by what is swept over. Outside a sweep, `run_dir` itself."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return run_dir
    named = hydra_config.job.override_dirname.replace("/", "_")
    return str(Path(run_dir) / (named or str(hydra_config.job.num)))


def explain(error: Exception, config_name: str, folder: Path = CONFIGS) -> str:
    """One sentence from Hydra's or OmegaConf's message, with a suggestion where a key is close to a real one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        return (
            f"The argument {error.override!r} cannot be read ({lines[0]}). Write key=value, with quotes around a value "
            "that holds commas, colons or brackets."
        )
    missing = re.search(r"Could not override '([^']+)'", str(error))
    if missing:
        return f"There is no config key '{missing[1]}'.{suggestion(missing[1], config_name, folder)}"
    group = re.search(r"In '[^']*': Could not find '([^']+)'", str(error)) or re.search(
        r"Could not find '([^']+)'", str(error)
    )
    if group:
        group_folder = folder / Path(group[1]).parent
        options = sorted(path.stem for path in group_folder.glob("*.yaml")) if group_folder.is_dir() else []
        return f"There is no config '{group[1]}'." + (f" There are: {', '.join(options)}." if options else "")
    # Everything up to Hydra's advice on sweeping and appending, which does not help here.
    return " ".join(line for line in lines if not re.match(r"(To append|full_key|object_type|See https)", line))


def suggestion(key: str, config_name: str, folder: Path) -> str:
    known = flat_keys(compose(config_name, [], folder))
    close = difflib.get_close_matches(key, known, n=1)
    return (
        f" Did you mean '{close[0]}'?"
        if close
        else f" Its keys are in {(folder / config_name).relative_to(CONFIGS.parent)}.yaml."
    )


def flat_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        if OmegaConf.is_dict(config) and not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            keys += flat_keys(config[key], f"{prefix}{key}.")
    return keys


def to_dataclass(schema: type[Schema], config: DictConfig) -> Schema:
    """A typed object from a composed config; a key that the dataclass lacks (also one added with `+`) is an error, and so
    is one that still has no value."""
    absent = sorted(OmegaConf.missing_keys(config))
    if absent:
        raise UserError(f"The config key '{absent[0]}' has no value; give it on the command line: {absent[0]}=…")
    check_parts(config)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        if "not in '" in str(error):
            key = getattr(error, "full_key", None) or str(error).split("'")[1]
            raise UserError(f"There is no config key '{key}'. Leave it out, or check its spelling.") from error
        key = getattr(error, "full_key", None)
        raise UserError((f"{key}: " if key else "") + str(error).splitlines()[0].rstrip(".") + ".") from error


def check_parts(config: DictConfig, where: str = "") -> None:
    """Every key of a part that Hydra may build is one that its class takes, whether this run builds it or not. Configs
    are built to see that."""
    for key in config:
        node = config._get_node(key)
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            continue
        name = f"{where}{key}"
        check_parts(node, f"{name}.")
        if "_target_" not in node:
            continue
        target = hydra.utils.get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        unknown = [one for one in node if not str(one).startswith("_") and one not in parameters]
        if unknown and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            raise UserError(f"There is no config key '{name}.{unknown[0]}'. Leave it out, or check its spelling.")
        if dataclasses.is_dataclass(target):
            build(node)


def build(node: DictConfig, **more: Any) -> Any:
    """Instantiates a config node with `more` merged in; a key that its class does not take is the user's mistake."""
    node = node.copy()
    OmegaConf.set_struct(node, False)
    try:
        return hydra.utils.instantiate(OmegaConf.merge(node, more))
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if isinstance(error.__cause__, TypeError):
            raise UserError(f"The config of {node.get('_target_')} does not fit: {error.__cause__}.") from error
        raise


def run(main: Callable[[], Any], config_name: str, free_text: set[str] | None = None) -> None:
    """Runs a Hydra main: a user's mistake is one sentence on standard error and exit status 2, without a traceback."""
    if not sweeping(sys.argv[1:]):  # there a comma means the next run
        sys.argv[1:] = quote_free_text(sys.argv[1:], free_text or set())
    try:
        flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        if sweeping(flags) and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            raise UserError(
                "torchrun starts the processes of one run, --multirun starts several runs: leave one of them out. To sweep "
                "over runs of several processes, call torchrun once per setting, or use +sweep=slurm."
            )
        if all(flag in ("-m", "--multirun") for flag in flags):  # others (--help, --cfg job) are Hydra's own
            check_overrides(config_name, sys.argv[1:])
            if sweeping(flags):
                sys.argv.append(name_by_swept(sys.argv[1:]))
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            main()
    except UserError as error:
        fail(error)


def show_warning(message: Warning | str, *_: Any) -> None:
    """A warning as one sentence, without the line of source that raised it."""
    print(f"warning: {message}", file=sys.stderr)


def fail(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
