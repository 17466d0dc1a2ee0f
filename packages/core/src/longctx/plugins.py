"""Discovery of plugins, one by one, so that a broken one harms nobody else.

Entry points of the group ``longctx`` are loaded one at a time: a plugin that raises, speaks
another protocol version or repeats a name becomes a `PluginFailure` that ``longctx doctor`` shows.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from longctx.contract import contract_breach
from longctx.errors import PluginError
from longctx.hookspecs import PROJECT, Hooks
from longctx.protocols.backend import Backend, BackendInfo
from longctx.protocols.kv_cache import KVCacheInfo
from longctx.protocols.selector import SelectorInfo
from longctx.protocols.version import PROTOCOL_VERSION, is_compatible
from longctx.settings import switched_on
from longctx.support import Reason, ReasonCode

__all__ = ["PluginFailure", "Registry", "register_plugin", "registry", "reset_registry"]

log = logging.getLogger(__name__)

_BUILT_IN = "longctx.torch_backend.plugin"


@dataclass(frozen=True)
class PluginFailure:
    """A plugin, or one of its contributions, that is not used, and why.

    Attributes
    ----------
    source : str
        Entry-point name and target, or the module named in ``LONGCTX_PLUGINS``.
    dist, version : str
        The distribution it came from; empty when it has none.
    reason : Reason
        What went wrong.
    name : str
        Name of the refused contribution; empty when the plugin did not get that far.
    """

    source: str
    dist: str
    version: str
    reason: Reason
    name: str = ""


@dataclass
class Registry:
    """Everything that plugins brought, by kind and name, and what failed."""

    backends: dict[str, BackendInfo] = field(default_factory=dict)
    selectors: dict[str, SelectorInfo] = field(default_factory=dict)
    kv_caches: dict[str, KVCacheInfo] = field(default_factory=dict)
    failures: list[PluginFailure] = field(default_factory=list)
    sources: dict[tuple[str, str], str] = field(default_factory=dict)
    _loaded: dict[str, Backend | tuple[Reason, ...]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def load_backend(self, name: str) -> Backend | tuple[Reason, ...]:
        """Return the loaded backend, or the reasons why it cannot be loaded; tried once."""
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._try_load(self.backends[name])
            return self._loaded[name]

    def _try_load(self, info: BackendInfo) -> Backend | tuple[Reason, ...]:
        try:
            missing = tuple(info.missing())
            if missing:
                return missing
            backend: Any = info.load()
            breach = contract_breach(backend)
        # a plugin may raise anything: OSError of a missing driver, SystemExit of a careless import
        except (Exception, SystemExit) as error:
            if _strict():
                raise PluginError(f"backend {info.name!r} failed to load: {error}") from error
            log.warning("backend %s failed to load: %s", info.name, error)
            return (_import_reason(error),)
        if breach:
            return (Reason(ReasonCode.IMPORT_FAILED, f"breaks the protocol: {breach}"),)
        loaded: Backend = backend
        return loaded

    def failure_of(self, name: str) -> PluginFailure | None:
        """Return the record of a plugin whose entry point or contribution has this name."""
        return next((f for f in self.failures if name in (f.source.split(" = ")[0], f.name)), None)


def _strict() -> bool:
    return switched_on("LONGCTX_STRICT_PLUGINS")


_registry: Registry | None = None
_registry_lock = threading.RLock()
_extra_plugins: list[tuple[str, Any]] = []
_on_reset: list[Callable[[], None]] = []


def registry() -> Registry:
    """Return the process-wide registry, discovering plugins on first use."""
    global _registry
    if _registry is None:
        with _registry_lock:
            if _registry is None:
                _registry = _discover()
    return _registry


def reset_registry() -> None:
    """Forget everything discovered, so that the next use looks again (for tests and notebooks)."""
    global _registry
    with _registry_lock:
        _registry = None
        for forget in _on_reset:
            forget()


def on_reset(forget: Callable[[], None]) -> None:
    """Call ``forget`` whenever the registry is reset: for what is derived from it."""
    _on_reset.append(forget)


def register_plugin(plugin: Any, *, name: str | None = None) -> None:
    """Add a plugin object or module without installed metadata, as ``LONGCTX_PLUGINS`` does.

    Parameters
    ----------
    plugin : object
        A module or object that carries ``@longctx.hookimpl`` functions.
    name : str, optional
        Name shown by ``longctx doctor``.
    """
    label: str = name or getattr(plugin, "__name__", None) or repr(plugin)
    _extra_plugins.append((label, plugin))
    reset_registry()


def unregister_plugin(plugin: Any) -> None:
    """Take back a plugin added by `register_plugin`."""
    _extra_plugins[:] = [entry for entry in _extra_plugins if entry[1] is not plugin]
    reset_registry()


def _discover() -> Registry:
    found = Registry()
    for source, dist, version, load in _candidates():
        try:
            plugin = load()
            contributions = _call_hooks(source, plugin)
        # isolation: whatever one plugin raises, the others still load
        except (Exception, SystemExit) as error:
            if _strict():
                raise PluginError(f"plugin {source} failed: {error}") from error
            _fail(found, source, dist, version, _import_reason(error))
            continue
        for kind, info in contributions:
            _admit(found, source, dist, version, kind, info)
    return found


def _candidates() -> Iterator[tuple[str, str, str, Callable[[], Any]]]:
    """Yield (source, dist, version, load): built-in, entry points, environment, registered."""
    version = _version("longctx-core")
    yield _BUILT_IN, "longctx-core", version, lambda: importlib.import_module(_BUILT_IN)
    entry_points = metadata.entry_points(group=PROJECT)
    for point in sorted(entry_points, key=lambda p: (p.name, p.value)):
        dist = point.dist
        yield (
            f"{point.name} = {point.value}",
            dist.name if dist else "",
            dist.version if dist else "",
            point.load,
        )
    for module in filter(None, os.environ.get("LONGCTX_PLUGINS", "").split(",")):
        yield module.strip(), "", "", functools.partial(importlib.import_module, module.strip())
    for name, plugin in _extra_plugins:
        yield name, "", "", functools.partial(_given, plugin)


def _given(plugin: Any) -> Any:
    return plugin


def _version(dist: str) -> str:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _call_hooks(source: str, plugin: Any) -> list[tuple[str, Any]]:
    """Register one plugin with a manager of its own, so that its failure is its own."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(plugin, name=source)
    manager.check_pending()
    found: list[tuple[str, Any]] = []
    hooks: Mapping[str, Any] = {
        "backends": manager.hook.longctx_backends,
        "selectors": manager.hook.longctx_selectors,
        "kv_caches": manager.hook.longctx_kv_caches,
    }
    for kind, hook in hooks.items():
        for infos in hook():
            found.extend((kind, info) for info in infos)
    if not found and not any(hook.get_hookimpls() for hook in hooks.values()):
        what = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__
        raise ValueError(f"{what} defines no @longctx.hookimpl function")
    return found


def _admit(found: Registry, source: str, dist: str, version: str, kind: str, info: Any) -> None:
    table: dict[str, Any] = getattr(found, kind)
    name: Any = getattr(info, "name", None)
    protocol: Any = getattr(info, "protocol", None)
    flaw = _metadata_flaw(kind, info)
    if flaw is not None:
        reason = Reason(ReasonCode.IMPORT_FAILED, f"the {kind} hook returned {flaw}")
    elif not is_compatible(protocol):
        theirs, ours = (".".join(map(str, v)) for v in (protocol, PROTOCOL_VERSION))
        reason = Reason(
            ReasonCode.PROTOCOL_VERSION,
            f"{name} speaks protocol {theirs}, this core speaks {ours}",
            f"install a version of {dist or source} made for protocol {ours}",
        )
    elif name in table:
        reason = Reason(
            ReasonCode.DUPLICATE_NAME,
            f"the name {name!r} is taken by {found.sources[kind, name]}",
            "uninstall one of the two",
        )
    else:
        table[name] = info
        found.sources[kind, name] = f"{dist} {version}".strip() or source
        return
    _fail(found, source, dist, version, reason, name if isinstance(name, str) else "")


def _metadata_flaw(kind: str, info: Any) -> str | None:
    """Return what is wrong with the metadata that a hook returned, None if nothing is."""
    name, protocol = getattr(info, "name", None), getattr(info, "protocol", None)
    if not isinstance(name, str) or protocol is None:
        return f"{info!r}, which has no name/protocol"
    if not name or name != name.lower() or name != name.strip():
        return f"the name {name!r}: names are lower case, without spaces around them"
    version = protocol if isinstance(protocol, tuple) else ()
    if len(version) != 2 or not all(type(part) is int for part in version):
        return f"the protocol {protocol!r} for {name}: it is two integers, (major, minor)"
    callables = ("load", "missing") if kind == "backends" else ("load",)
    absent = [field for field in callables if not callable(getattr(info, field, None))]
    return f"{name} without a callable {' and '.join(absent)}" if absent else None


def _fail(
    found: Registry, source: str, dist: str, version: str, reason: Reason, name: str = ""
) -> None:
    log.warning("longctx plugin %s is not used: %s", source, reason.message)
    found.failures.append(PluginFailure(source, dist, version, reason, name))


def _import_reason(error: BaseException) -> Reason:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"pip install {error.name.partition('.')[0]}"
    return Reason(ReasonCode.IMPORT_FAILED, f"{type(error).__name__}: {error}", hint)
