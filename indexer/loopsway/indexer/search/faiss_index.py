"""One FAISS index over decoded rows, made by a factory string or by the codes' bits; trained, stored and searched.

n rows, M queries, W width.

The kinds that are made without a factory string are exhaustive and lose next to nothing: sign bits in IndexRaBitQ for
1-bit codes (whose scores then equal a reading of the codes), a scalar quantizer or flat vectors for the others.

This is the only file that imports faiss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

QUERY_BITS = 8  # of a query that meets sign bits; 8 lose nothing measurable before scoring again
GRAPH_CANDIDATES = 64  # that a search of a graph keeps at reach 1 (efSearch)
POINTS_OF_A_CENTROID = 64  # FAISS warns below 39, and takes no more than 256
TRAINING_BYTES = 256 << 20  # of decoded rows that are held to train on: 8,192 rows of width 8,192
WORKING = "'IVF256,SQ8', 'IVF256,PQ256x4fs', 'HNSW32,SQ8', 'SQfp16'"

# What can be added to in order, scores by inner product, and passes over rows that are not selected.
_EXHAUSTIVE = ("IndexFlat", "IndexScalarQuantizer", "IndexRaBitQ")
_GRAPHS = ("IndexHNSWFlat", "IndexHNSWSQ")
_CELLS = (
    *("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan"),
    *("IndexIVFRaBitQ", "IndexIVFRaBitQFastScan"),
)
_LEAST_OF_A_TRANSFORM = 256  # OPQ trains a quantizer of 8 bits
_AROUND = {"IndexPreTransform": "index", "IndexRefine": "base_index", "IndexRefineFlat": "base_index"}


def import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "searching needs FAISS: install one of loopsway[cpu] (faiss-cpu) and loopsway[gpu] (faiss-gpu), never both"
        ) from error
    return faiss


def check_factory(factory: str | None, width: int, num_rows: int) -> None:
    """Refuses a factory string that an index of so many rows can't be made by.

    Raises:
        ValueError: FAISS can't read it, the kind can't be searched as we do, or it needs more rows to be trained.
    """
    if factory is None:
        return
    index = _by_factory(factory, width)
    _check_kind(index, factory)
    if num_rows < (least := _least_rows(index)):
        raise ValueError(
            f"FAISS factory {factory!r} needs {least:,} rows to be trained, and an index of a step here has "
            f"{num_rows:,}; take fewer cells (about the square root of the rows) or centroids, or no factory"
        )


def new_index(factory: str | None, width: int, bits: int, num_rows: int) -> Any:
    """An empty index for rows of so many bits; of the kind without a factory for fewer rows than it can be trained on.

    Additions, and the rest of what is cut into shards, may be as small as one row.
    """
    if factory is not None and num_rows >= _least_rows(index := _by_factory(factory, width)):
        return index
    faiss = import_faiss()
    metric = faiss.METRIC_INNER_PRODUCT
    if bits == 1:
        index = faiss.IndexRaBitQ(width, metric)
        index.qb = QUERY_BITS
        return index
    if bits == 32:
        return faiss.IndexFlat(width, metric)
    kind = faiss.ScalarQuantizer.QT_fp16 if bits == 16 else faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexScalarQuantizer(width, kind, metric)


def train(index: Any, extremes: Callable[[], np.ndarray], sample: Callable[[int], np.ndarray]) -> None:
    """Trains an index, quietly: what a poor training loses is measured.

    Args:
        index: as `new_index` gives it.
        extremes: the least and the largest of each coordinate, [2, W]: all that a scalar quantizer learns.
        sample: at most so many rows, [n, W].

    Raises:
        ValueError: FAISS can't be trained on these rows.
    """
    faiss = import_faiss()
    if index.is_trained:
        return
    if isinstance(index, faiss.IndexScalarQuantizer):
        rows = extremes()
    elif isinstance(index, faiss.IndexRaBitQ):
        rows = np.zeros((1, index.d), np.float32)  # its centre: the origin, so that it scores as the codes do
    else:
        least = _least_rows(index)
        rows = sample(max(least, min(POINTS_OF_A_CENTROID * least, TRAINING_BYTES // (4 * index.d))))
    try:
        index.train(rows)
    except RuntimeError as error:
        raise ValueError(f"FAISS can't train its index on {len(rows):,} rows: {error}; take another factory") from error


def needs_long_rows(index: Any) -> bool:
    """Whether rows of norm below 3e-4 are lost, and those near 1 in their cells' centres, whose norm is 1."""
    return any("RaBitQ" in type(each).__name__ for each in _layers(index))


def write(index: Any, file: Path) -> None:
    import_faiss().write_index(index, str(file))


def read(file: Path) -> Any:
    """The index in a file, memory-mapped where FAISS can.

    Raises:
        RuntimeError: it can't be read.
    """
    faiss = import_faiss()
    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)


def num_cells(index: Any) -> int:
    """Cells of the rows, of which a search visits some; 1 where there are none."""
    return next((each.nlist for each in _layers(index) if hasattr(each, "nlist")), 1)


def _is_graph(index: Any) -> bool:
    return any(type(each).__name__ in _GRAPHS for each in _layers(index))


def least_share(index: Any) -> float:
    """The least share of rows that may be kept for a search within them to find what one without a filter does.

    A walk in a graph stays among the rows that it would find without a filter; cells are only visited further on.
    """
    return 0.9 if _is_graph(index) else 0.25


def search(index: Any, queries: np.ndarray, count: int, *, reach: int, kept: np.ndarray | None) -> np.ndarray:
    """Rows that score highest, as the index sees it.

    Args:
        index: to search.
        queries: float32 [M, W].
        count: rows for each query.
        reach: cells to visit; or, times `GRAPH_CANDIDATES`, rows of a graph to keep while it is walked.
        kept: bool [n], those that may be found; None: all.

    Returns:
        int64 [M, count], -1 where none was found.
    """
    faiss = import_faiss()
    selector = None if kept is None else faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little"))
    return index.search(queries, count, params=_parameters(faiss, index, reach, selector))[1]


def _parameters(faiss: Any, index: Any, reach: int, selector: Any) -> Any:
    index = faiss.downcast_index(index)
    match type(index).__name__:
        case "IndexPreTransform":
            return faiss.SearchParametersPreTransform(index_params=_parameters(faiss, index.index, reach, selector))
        case "IndexRefine" | "IndexRefineFlat":
            base = _parameters(faiss, index.base_index, reach, selector)
            return faiss.IndexRefineSearchParameters(k_factor=reach, base_index_params=base)
        case "IndexRaBitQ":
            return faiss.RaBitQSearchParameters(sel=selector, qb=QUERY_BITS)
        case "IndexIVFRaBitQ":
            return faiss.IVFRaBitQSearchParameters(sel=selector, nprobe=reach, qb=QUERY_BITS)
        case name if name in _CELLS:
            return faiss.SearchParametersIVF(sel=selector, nprobe=reach)
        case name if name in _GRAPHS:
            return faiss.SearchParametersHNSW(sel=selector, efSearch=GRAPH_CANDIDATES * reach)
        case _:
            return faiss.SearchParameters(sel=selector)


def _by_factory(factory: str, width: int) -> Any:
    faiss = import_faiss()
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip()
        raise ValueError(
            f"FAISS can't make an index of width {width} by factory {factory!r} ({reason}); such as {WORKING} work"
        ) from error
    for each in _layers(index):  # warnings, one for each clustering, that say less than a measurement
        for clustering in (getattr(part, "cp", None) for part in (each, getattr(each, "pq", None))):
            if clustering is not None:
                clustering.min_points_per_centroid = 1
    return index


def _check_kind(index: Any, factory: str) -> None:
    faiss = import_faiss()
    *around, inner = _layers(index)
    allowed = (*_EXHAUSTIVE, *_GRAPHS, *_CELLS)
    wrong = next((each for each in around if type(each).__name__ not in _AROUND), None)
    if wrong is None and type(inner).__name__ in allowed and inner.metric_type == faiss.METRIC_INNER_PRODUCT:
        return
    raise ValueError(
        f"FAISS factory {factory!r} makes an {type(wrong or inner).__name__}, which can't pass over deleted rows or "
        f"does not search by inner product; such as {WORKING} work, and 'IVF1,' before a 'PQ...' that stands alone"
    )


def _layers(index: Any) -> Iterator[Any]:
    """An index, what it is around, and so on."""
    faiss = import_faiss()
    while True:
        index = faiss.downcast_index(index)
        yield index
        if (inner := _AROUND.get(type(index).__name__)) is None:
            return
        index = getattr(index, inner)


def _least_rows(index: Any) -> int:
    """What it needs to be trained on: as many rows as a clustering has centroids."""
    faiss = import_faiss()
    least = [1]
    for each in _layers(index):
        least += [each.nlist] if hasattr(each, "nlist") else []
        least += [each.pq.ksub] if hasattr(each, "pq") else []
        if isinstance(each, faiss.IndexPreTransform):
            steps = (faiss.downcast_VectorTransform(each.chain.at(place)) for place in range(each.chain.size()))
            least += [_LEAST_OF_A_TRANSFORM for step in steps if not step.is_trained]
    return max(least)
