"""The items that clients send: the history of a conversation, as messages for chat templates."""
