"""Tools whose schema Anthropic defines and which the client itself runs: the shell and the text editor.

A request names them by type and version only; here they become functions like any other. Used by `api.anthropic.messages.tools`.
https://platform.claude.com/docs/en/agents-and-tools/tool-use/bash-tool and /text-editor-tool
"""

from __future__ import annotations

from typing import Any

_STRING = {"type": "string"}
_INTEGER = {"type": "integer"}

_SHELL = {
    "description": "Run a command in a persistent bash session, or restart the session.",
    "input_schema": {
        "type": "object",
        "properties": {
            "command": _STRING | {"description": "The command to run. Required unless `restart` is true."},
            "restart": {"type": "boolean", "description": "Whether to restart the session."},
        },
    },
}

_EDITOR_COMMANDS = ["view", "create", "str_replace", "insert"]


def _editor(commands: list[str]) -> dict[str, Any]:
    return {
        "description": "View, create and edit text files.",
        "input_schema": {
            "type": "object",
            "properties": {
                "command": {"type": "string", "enum": commands},
                "path": _STRING | {"description": "Of the file or the directory."},
                "view_range": {
                    "type": "array",
                    "items": _INTEGER,
                    "description": "For `view`: the first and the last line, from 1; -1 is the end.",
                },
                "file_text": _STRING | {"description": "For `create`: the contents."},
                "old_str": _STRING | {"description": "For `str_replace`: the text to replace, exactly."},
                "new_str": _STRING | {"description": "For `str_replace` and `insert`: the new text."},
                "insert_line": _INTEGER | {"description": "For `insert`: the line to insert after, from 0."},
                "insert_text": _STRING | {"description": "For `insert`: the text to insert."},
            },
            "required": ["command", "path"],
        },
    }


_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bash_20241022": ("bash", _SHELL),
    "bash_20250124": ("bash", _SHELL),
    "text_editor_20241022": ("str_replace_editor", _editor([*_EDITOR_COMMANDS, "undo_edit"])),
    "text_editor_20250124": ("str_replace_editor", _editor([*_EDITOR_COMMANDS, "undo_edit"])),
    "text_editor_20250429": ("str_replace_based_edit_tool", _editor(_EDITOR_COMMANDS)),
    "text_editor_20250728": ("str_replace_based_edit_tool", _editor(_EDITOR_COMMANDS)),
}
"""By type: the name and the rest."""


def known_tool(kind: str | None, name: str | None) -> dict[str, Any] | None:
    """The name, the description and the schema of a tool of this type; None: it is not known.

    Args:
        name: As the request has it.
    """
    if kind not in _KNOWN:
        return None
    default, fields = _KNOWN[kind]
    return {"name": name or default, **fields}
