"""Trains `emoji`, the small text-to-image model that ships inside agentsd (entry point: ``apps/train_emoji.py``)."""
