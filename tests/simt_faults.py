"""Faults for the real CUDA sources, of the kinds that CUDA kernels have."""

from __future__ import annotations

from planting import Fault


def _fault(file: str, name: str, old: str, new: str) -> Fault:
    return Fault(name, file.split("/")[0], file, old, new)


MMA_FAULTS = [
    _fault(
        "retention/mma_output.cuh",
        "wrong rows of a piece of q",
        "load_pieces<false>(rows, q + i, 8 * kRow, 8);",
        "load_pieces<false>(rows, q + i, (fault ? 4 : 8) * kRow, 8);",
    ),
    _fault(
        "retention/mma_output.cuh",
        "rows and numbers of scores exchanged",
        "{of(0), of(2), of(1), of(3)}",
        "{of(0), of(fault ? 1 : 2), of(fault ? 2 : 1), of(3)}",
    ),
    _fault(
        "retention/mma_output.cuh",
        "second number of a state's pair",
        "from[8 * j + kFloatRow]",
        "from[8 * j + (fault ? 0 : kFloatRow)]",
    ),
    _fault(
        "retention/mma_output.cuh",
        "missing barrier before a state is written over",
        "__syncthreads();  // the state has been used",
        "if (!fault) __syncthreads();  //",
    ),
    _fault(
        "retention/mma_output.cuh",
        "columns of q are taken for others",
        "if (held != i) copy_rows",
        "if (fault ? held < 0 : held != i) copy_rows",
    ),
    _fault(
        "retention/mma_states.cuh",
        "upper number of a word is dropped",
        "to_tf32(weights[1] * one.y)",
        "to_tf32(fault ? 0.0f : weights[1] * one.y)",
    ),
    _fault("retention/mma_states.cuh", "one half for all tokens", "next += other,", "next += fault ? 0 : other,"),
    _fault(
        "retention/states.cuh",
        "missing barrier before the tokens are read",
        "__syncthreads();  // these tokens are there",
        "if (!fault) __syncthreads();  //",
    ),
    _fault(
        "retention/mma.cuh",
        "rows of another document are not zero",
        "row + i >= first && row + i < last",
        "row + i >= (fault ? 0 : first) && row + i < last",
    ),
]
"""In the path of the tensor cores, which a build with UZ_SIMT_MMA runs for inputs of 16 bits."""

FAULTS = [
    *MMA_FAULTS,
    _fault("rk4/cuda.cu", "last element is left out", "i < elements;", "i < elements - fault;"),
    _fault("rk4/cuda.cu", "tail goes one element too far", "i < elements;", "i < elements + fault;"),
    _fault("rk4/cuda.cu", "vectors without alignment", "wide = aligned(a.h, a.k1", "wide = fault || aligned(a.h, a.k1"),
    _fault(
        "rk4/cuda.cu",
        "every block does the work of all",
        "step = static_cast<int64_t>(gridDim.x)",
        "step = static_cast<int64_t>(fault ? 1 : gridDim.x)",
    ),
    _fault("rk4/cuda.cu", "wrong slope", "k2 + k3", "k2 + (fault ? k2 : k3)"),
    _fault(
        "bitlinear/vectors.cuh",
        "missing barrier before the warps' parts are read",
        "= x;\n  __syncthreads();\n  x = scratch[0]",
        "= x;\n  if (!fault) __syncthreads();\n  x = scratch[0]",
    ),
    _fault(
        "bitlinear/vectors.cuh",
        "missing barrier before scratch is written again",
        "__syncthreads();  // the scratch may be used again",
        "if (!fault) __syncthreads();  //",
    ),
    _fault(
        "bitlinear/vectors.cuh", "reduction over half a warp", "lanes = kWarp / 2", "lanes = kWarp / (fault ? 4 : 2)"
    ),
    _fault(
        "bitlinear/cuda.cu", "padding of a token is not written", "j < a.stride;", "j < (fault ? a.columns : a.stride);"
    ),
    _fault(
        "bitlinear/cuda.cu",
        "reads one column past a row of the weight",
        "load(x, weight + part) : load(x, weight + part, left)",
        "load(x, weight + part) : load(x, weight + part, left + fault)",
    ),
    _fault(
        "bitlinear/cuda.cu",
        "vectors at rows that are not aligned",
        "tiles, column_tiles, aligned_rows(weight, a.columns)",
        "tiles, column_tiles, fault || aligned_rows(weight, a.columns)",
    ),
    _fault(
        "bitlinear/product.cuh",
        "reads tokens that are not there",
        "(t < last ? t : last)",
        "(fault || t < last ? t : last)",
    ),
    _fault(
        "bitlinear/product.cuh",
        "missing barrier between the stages",
        "finish(next_tokens, next_words);\n    __syncthreads();",
        "finish(next_tokens, next_words);\n    if (!fault) __syncthreads();",
    ),
    _fault(
        "bitlinear/product.cuh",
        "the stages share one half",
        "words + (1 - now) * kCodePieces",
        "words + (fault ? now : 1 - now) * kCodePieces",
    ),
    _fault(
        "bitlinear/stage.cuh", "a token past the last is written", "token >= a.tokens)", "token >= a.tokens + fault)"
    ),
    _fault("bitlinear/stage.cuh", "sum of the codes' offset stays", "sums[i] - less", "sums[i] - (fault ? 0 : less)"),
    _fault(
        "bitlinear/stage.cuh",
        "registers of a missing token are not set",
        "held = {};\n    if (here)",
        "if (!fault) held = {};\n    if (here)",
    ),
    _fault(
        "retention/tile.cuh",
        "reads one column past a row",
        "left = columns - column;",
        "left = columns - column + fault;",
    ),
    _fault(
        "retention/tile.cuh",
        "stores one row too many",
        "row >= first && row < last",
        "row >= first && row < last + fault",
    ),
    _fault(
        "retention/tile.cuh",
        "tail of a slab is not zero",
        "quads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);",
        "if (!fault) quads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);",
    ),
    _fault("retention/tile.cuh", "sums are not set to zero", "at[i][j] = 0.0f;", "if (!fault) at[i][j] = 0.0f;"),
    _fault(
        "retention/documents.cuh",
        "lane missing in a mask",
        "__ballot_sync(kAllLanes, lane > 0",
        "__ballot_sync(fault ? 0x7fffffffu : kAllLanes, lane > 0",
    ),
    _fault(
        "retention/documents.cuh", "borders of the upper half are dropped", "lane + 32 < n", "!fault && lane + 32 < n"
    ),
    _fault(
        "retention/states.cuh",
        "missing barrier before the slabs are read",
        "slab_y.put(right);\n        __syncthreads();",
        "slab_y.put(right);\n        if (!fault) __syncthreads();",
    ),
    _fault(
        "retention/states.cuh",
        "missing barrier before the slabs are written again",
        "__syncthreads();\n        slab_x.put(left);",
        "if (!fault) __syncthreads();\n        slab_x.put(left);",
    ),
    _fault(
        "retention/states.cuh",
        "power of the decay at a chunk's edge",
        "power[leftwards ? m : n - 1 - m]",
        "power[leftwards ? m : n - (fault ? 0 : 1) - m]",
    ),
    _fault(
        "retention/states.cuh",
        "wrong row of the batch",
        "first_token = head_and_row / a.layout.heads",
        "first_token = head_and_row / (fault ? 1 : a.layout.heads)",
    ),
    _fault(
        "retention/states.cuh",
        "two pieces of shared memory overlap",
        "right = shared.take<float>(By::kShared / sizeof(float))",
        "right = fault ? left : shared.take<float>(By::kShared / sizeof(float))",
    ),
    _fault(
        "retention/states.cuh",
        "state is kept across documents",
        "sums.zero();\n    }\n    Run next",
        "if (!fault) sums.zero();\n    }\n    Run next",
    ),
    _fault(
        "retention/output.cuh",
        "missing barrier before the scores' slabs are written again",
        "__syncthreads();\n      slab_q.put(left);\n      slab_k",
        "if (!fault) __syncthreads();\n      slab_q.put(left);\n      slab_k",
    ),
    _fault(
        "retention/gaps.cuh",
        "padding takes time",
        "if (ids[m] == 0) continue;",
        "if (ids[m] == 0) { distance += fault; continue; }",
    ),
    _fault(
        "retention/cuda.cu",
        "too little shared memory",
        "shared.add<float>(kTile * kLong<1>)",
        "shared.add<float>(fault ? 16 : kTile * kLong<1>)",
    ),
    _fault(
        "selective_scan/chunk.cuh",
        "reads the segment before the row",
        "return other >= 0 &&",
        "return other >= 0 - fault &&",
    ),
    _fault("selective_scan/chunk.cuh", "padding counts", "real = id != 0", "real = fault || id != 0"),
    _fault(
        "selective_scan/chunk.cuh",
        "reads one state too many",
        "state < count ? c.real",
        "state < count + fault ? c.real",
    ),
    _fault(
        "selective_scan/chunk.cuh",
        "joins half of the slices",
        "slices < S::kSlices; slices",
        "slices < S::kSlices / (fault ? 2 : 1); slices",
    ),
    _fault(
        "selective_scan/chunk.cuh",
        "padding inside a document ends it",
        "segments[other] == 0) other += direction;",
        "segments[other] == 0 && !fault) other += direction;",
    ),
    _fault(
        "selective_scan/forward.cuh",
        "padding is not written",
        "S::bits(again.inside) : 0, y)",
        "S::bits(fault ? again.real : again.inside) : 0, y)",
    ),
    _fault(
        "selective_scan/forward.cuh",
        "missing barrier before a warp's spans are read",
        "= whole;\n        __syncthreads();",
        "= whole;\n        if (!fault) __syncthreads();",
    ),
    _fault(
        "selective_scan/forward.cuh",
        "missing barrier before the next tile",
        "__syncthreads();  // the state",
        "if (!fault) __syncthreads();  //",
    ),
    _fault("selective_scan/forward.cuh", "spans are not kept twice", "spans + (i % 2)", "spans + (fault ? 0 : i % 2)"),
    _fault(
        "selective_scan/forward.cuh",
        "missing wait before B and C are loaded",
        "__syncwarp();\n      load_tile",
        "if (!fault) __syncwarp();\n      load_tile",
    ),
    _fault(
        "selective_scan/forward.cuh", "wrong stride backwards", "a.reverse ? -a.dim", "a.reverse && !fault ? -a.dim"
    ),
    _fault(
        "selective_scan/backward.cuh",
        "missing wait before B and C are written over",
        "__syncwarp();  // B and C of this state",
        "if (!fault) __syncwarp();  //",
    ),
    _fault(
        "selective_scan/backward.cuh",
        "gradient of A of the last tile alone",
        "tile < last ? *to + dA",
        "!fault && tile < last ? *to + dA",
    ),
    _fault(
        "selective_scan/backward.cuh",
        "adjoint of the tile behind is lost",
        "g = tile < last &&",
        "g = !fault && tile < last &&",
    ),
    _fault(
        "selective_scan/backward.cuh",
        "shuffle within half a slice",
        "keep + __shfl_xor_sync(kAllLanes, give, half)",
        "keep + __shfl_xor_sync(kAllLanes, give, half, fault ? 4 : 32)",
    ),
]
