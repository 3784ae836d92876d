"""The tools of coding agents: how a step of a task is expressed with the functions that a request offers.

Each agent names its tools and their arguments differently. `Toolbox` chooses by the functions that are offered and falls back to
the shell. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from tests.clients.scripted.conversation import Call, ScriptError

Functions = dict[str, dict[str, Any]]
Maker = Callable[[str], dict[str, Any]]

_SHELLS: dict[str, Maker] = {
    "Bash": lambda command: {"command": command, "description": "Run a command"},  # Claude Code
    "bash": lambda command: {"command": command, "description": "Run a command"},  # OpenCode
    "run_shell_command": lambda command: {"command": command, "is_background": False},  # Qwen Code
    "exec_command": lambda command: {"cmd": command},  # Codex
    "shell_command": lambda command: {"command": command},  # Codex, older
    "shell": lambda command: {"command": ["bash", "-lc", command]},  # Codex, older still
}
_LISTS: dict[str, Maker] = {"list_directory": lambda folder: {"path": folder}}  # Qwen Code
_READS: dict[str, Maker] = {
    "Read": lambda path: {"file_path": path},  # Claude Code
    "read": lambda path: {"filePath": path},  # OpenCode
    "read_file": lambda path: {"file_path": path},  # Qwen Code
}
_EDITS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "Edit": lambda path, old, new: {
        "file_path": path,
        "old_string": old,
        "new_string": new,
        "replace_all": False,
    },  # Claude Code
    "edit": lambda path, old, new: {"filePath": path, "oldString": old, "newString": new},  # OpenCode
}


class Toolbox:
    """See the module.

    Args:
        functions: By name, the schema of the parameters.
    """

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    @property
    def has_shell(self) -> bool:
        return any(name in self._functions for name in _SHELLS)

    def run(self, command: str) -> Call:
        """Run a shell command."""
        return self._first(_SHELLS, command)

    def list_files(self, folder: str) -> Call:
        """List a folder."""
        if any(name in self._functions for name in _LISTS):
            return self._first(_LISTS, folder)
        return self.run(f"ls {shlex.quote(folder)}")

    def read(self, path: str) -> Call:
        """Read a file."""
        if any(name in self._functions for name in _READS):
            return self._first(_READS, path)
        return self.run(f"cat {shlex.quote(path)}")

    def edit(self, path: str, old: str, new: str) -> Call:
        """Replace a line of a file."""
        if "apply_patch" in self._functions:  # Codex; a custom tool has one parameter, `input`
            patch = f"*** Begin Patch\n*** Update File: {path}\n@@\n-{old}\n+{new}\n*** End Patch\n"
            return self._checked("apply_patch", {"input": patch})
        for name, make in _EDITS.items():
            if name in self._functions:
                known = self._functions[name].get("properties") or {}
                arguments = make(path, old, new)
                if set(arguments) - set(known):  # Qwen Code's `edit` has the arguments of Claude Code's
                    arguments = _EDITS["Edit"](path, old, new)
                return self._checked(name, arguments)
        replace = f"import pathlib; p = pathlib.Path({path!r}); p.write_text(p.read_text().replace({old!r}, {new!r}))"
        return self.run(f"python3 -c {shlex.quote(replace)}")

    def _first(self, makers: dict[str, Maker], argument: str) -> Call:
        for name, make in makers.items():
            if name in self._functions:
                return self._checked(name, make(argument))
        raise ScriptError(f"none of the functions is known: {sorted(self._functions)}")

    def _checked(self, name: str, arguments: dict[str, Any]) -> Call:
        """The call without arguments that are not offered; all required ones must be there."""
        schema = self._functions[name]
        known = schema.get("properties") or {}
        kept = {key: value for key, value in arguments.items() if key in known}
        if missing := set(schema.get("required") or []) - set(kept):
            raise ScriptError(f"{name} requires {sorted(missing)}, which the script does not know")
        return Call(name, kept)
