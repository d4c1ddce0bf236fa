"""Rationales: ask teachers, store replies, report on their quality."""
