"""Turns a pretrained decoder into nested sub-networks: ranks what matters, moves it to the front, cuts prefixes."""

from flextron.elastic.checkpoint import ElasticInfo, read_elastic, write_elastic
from flextron.elastic.extract import extract
from flextron.elastic.importance import Importance, rank
from flextron.elastic.permute import permute

__all__ = ["ElasticInfo", "Importance", "extract", "permute", "rank", "read_elastic", "write_elastic"]
