// The machine a kernel written for hopper/ runs on: Hopper's instructions, one function each.
//
// Shared memory is addressed by offsets from an aligned start. The tests have an emulator with the
// same functions.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../dtype.h"
#include "wgmma.cuh"
#include "wgmma_wide.cuh"

namespace pixeldiff::hopper {

class Device {
 public:
  using TensorMap = CUtensorMap;  // a __grid_constant__ parameter of the kernel

  __device__ __forceinline__ explicit Device(uint32_t start) : start_(start) {}

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return gridDim.x; }
  __device__ __forceinline__ uint32_t address(uint32_t offset) const { return start_ + offset; }

  // --- barriers in shared memory
  __device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals)
                 : "memory");
  }
  // What was initialised is seen by the copy engine.
  __device__ __forceinline__ void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_to_async();
  }
  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) const {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(address(barrier)),
        "r"(parity)
        : "memory");
  }

  // --- the cluster
  __device__ __forceinline__ int rank() const {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
  }
  __device__ __forceinline__ void sync_cluster() const {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  // At the barrier of that block. For what the tensor cores have read and the copy engine writes
  // again: those reads are over when the wait for the product is. Neither this nor the wait there
  // names a scope, since `cluster` would order this thread's own accesses too, by a MEMBAR.GPU and
  // by emptying the first-level cache.
  __device__ __forceinline__ void arrive_at(int rank, uint32_t barrier) const {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(address(barrier)),
        "r"(rank)
        : "memory");
  }

  // --- the copy engine
  __device__ __forceinline__ void load_box(const CUtensorMap& map, uint32_t to, uint32_t barrier,
                                           int channel, int head, int row, int image) const {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address(to)),
        "l"(&map), "r"(address(barrier)), "r"(channel), "r"(head), "r"(row), "r"(image)
        : "memory");
  }
  // The same into the block of every rank r whose bit r is set, at its own barrier there.
  __device__ __forceinline__ void load_box_for(uint16_t ranks, const CUtensorMap& map, uint32_t to,
                                               uint32_t barrier, int channel, int head, int row,
                                               int image) const {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(address(to)),
        "l"(&map), "r"(address(barrier)), "r"(channel), "r"(head), "r"(row), "r"(image), "h"(ranks)
        : "memory");
  }
  // What this thread stored in shared memory is seen by the tensor cores and the copy engine.
  __device__ __forceinline__ void publish_to_async() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void store_zero16(uint32_t to) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address(to)), "r"(0) : "memory");
  }

  // --- the tensor cores. An accumulator is not to be touched between its wgmma and the wait.
  __device__ __forceinline__ void wgmma_fence() const {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void wgmma_commit() const {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  // Until at most kPending groups are under way; `d` is what they no longer write.
  template <int kPending, int n>
  __device__ __forceinline__ void wgmma_wait(float (&d)[n]) const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }
  // Until none is, but not before `x` is there: the assembler moves a wait up past arithmetic that
  // stands before it, which then no longer runs under the product. It does not move one past a
  // branch; the comments keep it from seeing that both ways are the same. `a` is what the products
  // no longer read.
  template <int n, int k>
  __device__ __forceinline__ void wgmma_wait_after(float x, float (&d)[n], uint32_t (&a)[k]) const {
    if (any(x >= 0.0f))
      asm volatile("wgmma.wait_group.sync.aligned 0;  // one way" ::: "memory");
    else
      asm volatile("wgmma.wait_group.sync.aligned 0;  // the other" ::: "memory");
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
#pragma unroll
    for (int i = 0; i < k; ++i) asm volatile("" : "+r"(a[i])::"memory");
  }
  // The same where only what they read is to be free again.
  template <int kPending>
  __device__ __forceinline__ void wgmma_wait() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
  template <bool kBf16, int n>
  __device__ __forceinline__ void wgmma_shared(float (&d)[n], uint64_t a, uint64_t b,
                                               bool add) const {
    hopper::wgmma_shared<kBf16>(d, a, b, add);
  }
  template <bool kBf16, int n>
  __device__ __forceinline__ void wgmma_registers(float (&d)[n], const uint32_t* a,
                                                  uint64_t b) const {
    hopper::wgmma_registers<kBf16>(d, a, b);
  }
  template <int n>
  __device__ __forceinline__ void wgmma_shared_e4m3(float (&d)[n], uint64_t a, uint64_t b,
                                                    bool add) const {
    hopper::wgmma_shared_e4m3(d, a, b, add);
  }
  template <int n>
  __device__ __forceinline__ void wgmma_registers_e4m3(float (&d)[n], const uint32_t* a, uint64_t b,
                                                       bool add) const {
    hopper::wgmma_registers_e4m3(d, a, b, add);
  }

  // D += A B of a warp alone, 16 rows by 8 columns over 16.
  template <bool kBf16>
  __device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t b0,
                                           uint32_t b1) const {
    if constexpr (kBf16)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  // --- threads
  template <int n>
  __device__ __forceinline__ void release_registers() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
  }
  template <int n>
  __device__ __forceinline__ void claim_registers() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
  }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void named_sync(int barrier, int threads) const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }
  __device__ __forceinline__ void named_arrive(int barrier, int threads) const {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }
  __device__ __forceinline__ float shuffle_xor(float x, int lanes) const {
    return __shfl_xor_sync(0xffffffff, x, lanes);
  }
  // What that lane of the warp has.
  __device__ __forceinline__ uint32_t shuffle(uint32_t x, int lane) const {
    return __shfl_sync(0xffffffff, x, lane);
  }
  __device__ __forceinline__ bool any(bool x) const { return __any_sync(0xffffffff, x); }
  __device__ __forceinline__ uint32_t ballot(bool x) const { return __ballot_sync(0xffffffff, x); }

  // --- arithmetic
  // NaN if either is.
  __device__ __forceinline__ float max(float a, float b) const {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
  }
  __device__ __forceinline__ float exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ float log2(float x) const { return log2f(x); }
  // 1 / sqrt(x), to two units in the last place.
  __device__ __forceinline__ float rsqrt(float x) const { return rsqrtf(x); }
  // Of a normal number, to one unit in the last place.
  __device__ __forceinline__ float reciprocal(float x) const {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Rounded to nearest even, `low` in the low half.
  template <bool kBf16>
  __device__ __forceinline__ uint32_t pack(float low, float high) const {
    uint32_t both;
    if constexpr (kBf16)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  // Rounded, whatever is added to it.
  __device__ __forceinline__ float multiply(float a, float b) const { return __fmul_rn(a, b); }
  // Four values of e4m3, `a` in the lowest byte: rounded to nearest even, beyond 448 saturated; a
  // NaN stays one.
  __device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) const {
    uint32_t all;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "=r"(all)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return all;
  }

  // The two values that `pack` made of its arguments.
  template <bool kBf16>
  __device__ __forceinline__ void unpack(uint32_t both, float& low, float& high) const {
    if constexpr (kBf16) {
      low = __uint_as_float(both << 16);
      high = __uint_as_float(both & 0xffff0000u);
    } else {
      const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&both));
      low = wide.x;
      high = wide.y;
    }
  }
  // Rounded once, as the root and its inverse are in turn.
  __device__ __forceinline__ float divide(float a, float b) const { return __fdiv_rn(a, b); }
  __device__ __forceinline__ float inverse_root(float x) const {
    return __fdiv_rn(1.0f, __fsqrt_rn(x));
  }

  // --- global memory
  __device__ __forceinline__ uint8_t load(const uint8_t* p) const { return __ldg(p); }
  // Here and not where it is needed first.
  __device__ __forceinline__ float load(const float* p) const {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
  }
  // n elements, 1, 2 or 8, at a multiple of their size or of 16 bytes.
  template <DType kType, int n>
  __device__ __forceinline__ void load(const char* p, float (&x)[n]) const {
    if constexpr (kType == DType::f32) {
#pragma unroll
      for (int i = 0; i < n; i += n == 8 ? 4 : n) {
        if constexpr (n == 8) {
          const float4 four = __ldg(reinterpret_cast<const float4*>(p) + i / 4);
          x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        } else if constexpr (n == 2) {
          const float2 two = __ldg(reinterpret_cast<const float2*>(p));
          x[0] = two.x, x[1] = two.y;
        } else {
          x[0] = __ldg(reinterpret_cast<const float*>(p));
        }
      }
    } else {
      uint32_t words[(n + 1) / 2];
      if constexpr (n == 8) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(p));
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
      } else if constexpr (n == 2) {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
      } else {
        words[0] = __ldg(reinterpret_cast<const uint16_t*>(p));
      }
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const auto bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        x[i] = kType == DType::bf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                    : __half2float(__ushort_as_half(bits));
      }
    }
  }
  __device__ __forceinline__ void store(char* p, uint32_t a, uint32_t b) const {
    *reinterpret_cast<uint2*>(p) = make_uint2(a, b);
  }
  __device__ __forceinline__ uint32_t load(const uint32_t* p) const { return __ldg(p); }
  __device__ __forceinline__ void store(char* p, uint32_t value) const {
    *reinterpret_cast<uint32_t*>(p) = value;
  }
  // The lower two bytes.
  __device__ __forceinline__ void store_low(char* p, uint32_t value) const {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(value);
  }
  __device__ __forceinline__ void store(float* p, float value) const { *p = value; }
  // 1 or 4 values of 4 bytes at once, at a multiple of their size; loads of what nobody writes.
  template <int n>
  __device__ __forceinline__ void load_floats(const float* p, float* to) const {
    if constexpr (n == 1) {
      *to = __ldg(p);
    } else {
      static_assert(n == 4, "1 or 4");
      const float4 all = __ldg(reinterpret_cast<const float4*>(p));
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }
  }
  template <int n>
  __device__ __forceinline__ void load_words(const char* p, uint32_t* to) const {
    if constexpr (n == 1) {
      *to = __ldg(reinterpret_cast<const uint32_t*>(p));
    } else {
      static_assert(n == 4, "1 or 4");
      const uint4 all = __ldg(reinterpret_cast<const uint4*>(p));
      to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    }
  }
  template <int n>
  __device__ __forceinline__ void store_words(char* p, const uint32_t* from) const {
    if constexpr (n == 1) {
      *reinterpret_cast<uint32_t*>(p) = *from;
    } else {
      static_assert(n == 4, "1 or 4");
      *reinterpret_cast<uint4*>(p) = make_uint4(from[0], from[1], from[2], from[3]);
    }
  }

 private:
  uint32_t start_;
};

}  // namespace pixeldiff::hopper
