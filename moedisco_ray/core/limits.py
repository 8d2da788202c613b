"""Limits that a stage keeps to and a plan counts with; both read them here, where there is no torch."""

from __future__ import annotations

# Training.
STEP_ELEMENTS = 2**24
"""Maximum elements that an optimizer's step handles at once (320 MiB of fp32 copies next to bf16 weights). A whole
embedding would need several GB. Muon orthogonalises a larger matrix alone."""
NEWTON_SCHULZ_STEPS = 5
"""Number of Newton-Schulz steps with which Muon orthogonalises a matrix, as in Jordan et al. 2024."""
MOMENT_BLOCK = 128
"""Number of elements of a moment in 8 bits that share a scale. With 128, a large element spoils few others, and scales
in bf16 need only 1.6 % more memory."""
LOGITS_BYTES = 64 * 2**20
"""Maximum memory of logits, their copies and their gradients during a training step (bytes)."""
NF4_BLOCK = 64
"""Number of weights in 4 bits that share a scale."""
NF4_GROUP = 256
"""Number of scales of weights in 4 bits that share a factor."""
FLASH_HEAD_SIZE, FLASH_HEAD_STEP = 256, 8
"""Head sizes of torch's FlashAttention: at most 256, and multiples of 8."""
SYNC_ELEMENTS = 2**20
"""Maximum number of weights that a sync reads and combines at a time; they take 8 MiB in float64."""
SYNC_AHEAD = 8
"""Number of pieces that a sync reads ahead, in as many threads; they take 32 MiB. An object store answers each after
tens of milliseconds."""

# Models that read text without training.
RESIDENT_SHARE = 0.4
"""Maximum share of a GPU's memory for a model that stays loaded: the rest is for activations."""
RESIDENT_BYTES = 2**30
"""Maximum size of a model that stays in a CPU's memory after its first use (bytes)."""
CPU_STATES, GPU_STATES = 2**29, 2**32
"""Maximum size of a group's hidden states (bytes). Each layer is loaded once per group, so larger groups cause fewer
loads."""
BATCH_TOKENS = 16_384
"""Maximum positions of a batch that is scored, padding included, unless one window is longer."""
MOST_LOGITS = 2**25
"""Maximum number of logits in memory while text is scored: 128 MB in fp32."""
SMALLER = 4
"""Number by which a second try divides its batches after the first ran out of memory."""
ENSEMBLE_BLOCK = 64
"""Number of consecutive tokens that are predicted with the same ensemble weights. Separate weights for each token would
need the distances of every prefix of every document."""
ENSEMBLE_TEMPERATURE = 0.1
"""Temperature tau of an ensemble's weights (in units of a squared distance): the value in the evaluation command of the
method's authors (c-BTM, arXiv 2303.14177)."""
LOST_BY_MERGING = 0.005
"""Loss that a merge may cost on the text of any cluster (nats per token); above it, sub-models that started from a
trained model stay apart."""
VECTOR_TOKENS = 32_768
"""Maximum tokens of a batch of documents whose vectors a model computes on a GPU."""
CALIBRATION_WINDOWS = 16
"""Maximum number of windows in a batch on which routers are calibrated."""
USE_TOKENS = 65_536
"""Maximum tokens on which it is measured which experts of a trained MoE each cluster selects."""
BF16_STEP = 8
"""Number that divides the sizes of experts on GPUs in bf16: rows of a grouped product are whole numbers of 16 bytes."""

# Machines.
USABLE_MEMORY = 0.95
"""Share of a machine's memory that processes may use; above it, Ray kills processes."""
WORKER_PROCESS_GB = 3.0
"""Memory of a worker on its machine (GiB), for CUDA libraries, torch and Ray's raylet; a copy of a checkpoint is
extra."""

# Text and files.
TEXT_BYTES_PER_TOKEN = 4
"""Assumed bytes of text per token: typical of English text and a vocabulary of 32,000 or more entries."""
MOST_READINGS = 4
"""Number of times that text can be read with nearly the use of new text (Muennighoff et al., arXiv 2305.16264)."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".br")
"""Endings of compressed files; the ending before them names the format."""
PARQUET = (".parquet", ".pq")
TEXT_PER_COMPRESSED = 4
"""Assumed bytes of text per byte of a compressed file."""
RANGE_BYTES = 32 * 2**20
"""Text per range of document ids, which one task holds in memory (bytes); more in a corpus of over 128 GB."""
HELD_BYTES = 128 * 2**20
"""Documents that a process brings together in memory at once (bytes); it needs three times as much."""
CLUSTERED = 1.25
"""Ratio of the tokens that are clustered to the tokens that the sub-models train on, if the corpus is large enough.
Thanks to the additional text, no sub-model has to repeat text, and routers are also calibrated on text that no
sub-model has trained on."""
SAMPLED_DOCUMENTS = 10_000
"""Number of documents on which k-means and tf-idf are fitted, and from which the silhouette and the map of the clusters
are computed."""
CENTROID_DOCUMENTS = 256
"""Minimum number of documents per centroid on which k-means is fitted, unless the corpus has fewer; as by default in
faiss (`Clustering`). Compared with fits on all of 200,000 documents, the inertia was 0.94 times as large with 8
clusters. With 64 clusters and 64 documents per centroid it was 1.019 times as large."""
BALANCE_DOCUMENTS = 100_000
"""Number of documents on which the prices of balanced clusters are fitted. With 64 clusters, their costs take 26 MB,
and fitting takes 0.3 GB. The loads of such a sample have an error of about 4 %, which the corrections remove."""
MOST_TERMS, TERM_DIMENSIONS = 50_000, 64
"""Maximum number of terms of tf-idf, and number of dimensions to which an SVD reduces it."""
SAMPLE_TOKENS = 48
"""Number of tokens by which a finished model continues a prompt."""
SHARD_BYTES = 2 * 2**30
"""Maximum size of a safetensors file (bytes)."""
