"""Conversations and the chat template that makes text of them.

In: messages, tools, a tokenizer. Out: text and token ids, and what a template reads of a message. Start with template.py.
"""
