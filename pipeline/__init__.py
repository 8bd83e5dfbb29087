"""The stages of PrefixFleet as a plain library: data, prefix, training, evaluation, registry, inference.

Knows nothing of Prefect and imports nothing of `flows`. Each room reads files that the room before it wrote.
"""

__version__ = "0.1.0"
