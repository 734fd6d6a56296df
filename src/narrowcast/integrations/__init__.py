"""Adapters to trainers that people have already, each of which imports its host when it is used."""
