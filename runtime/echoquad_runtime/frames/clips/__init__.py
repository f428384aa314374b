"""Clips: decoded frames of video files, and what their containers announce, read without a decoder."""
