"""Prepared data on disk: tokens, images and frozen vision features, by the content that they were made from."""
