"""A small made-up world in English, written from a seed: facts, tasks and the corpus that teaches them.

Because the generator knows every fact, the quality of a model trained on it is exact. Standard library
only; the same seed gives the same bytes on any Python.
"""

from burnish.world.corpus import MIXTURE, documents, write_corpus
from burnish.world.facts import Fact, World
from burnish.world.tasks import TASKS

__all__ = ["MIXTURE", "TASKS", "Fact", "World", "documents", "write_corpus"]
