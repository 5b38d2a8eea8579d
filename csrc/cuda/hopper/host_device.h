// Functions that a GPU runs and a CPU tests.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PIXELDIFF_HOST_DEVICE __host__ __device__ __forceinline__
#define PIXELDIFF_DEVICE __device__ __forceinline__
#define PIXELDIFF_UNROLL _Pragma("unroll")
#define PIXELDIFF_PRAGMA(text) _Pragma(#text)
#define PIXELDIFF_UNROLL_BY(n) PIXELDIFF_PRAGMA(unroll n)
#else
#define PIXELDIFF_HOST_DEVICE inline
#define PIXELDIFF_DEVICE inline
#define PIXELDIFF_UNROLL
#define PIXELDIFF_UNROLL_BY(n)
#endif
