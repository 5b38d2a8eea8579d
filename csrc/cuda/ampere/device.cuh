// The machine a kernel written for ampere/ runs on: copies and products as sm_80 and all later
// devices have them. What threads, arithmetic and global memory do is in Hopper's, of which only
// the functions that are called have to exist on a device.
#pragma once

#include "../hopper/device.cuh"

namespace pixeldiff::ampere {

class Device : public hopper::Device {
 public:
  using hopper::Device::Device;

  // Read every time that it is asked for, and not kept in a register in between.
  __device__ __forceinline__ int block() const {
    int index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
  }
  __device__ __forceinline__ int thread_again() const {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
  }

  // --- copies. 16 bytes from global to shared memory, or 16 zeros where they are not `there`.
  __device__ __forceinline__ void copy16(uint32_t to, const char* from, bool there) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void commit_copies() const {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // Until at most kPending groups of this thread are under way. Others see what it copied after a
  // barrier.
  template <int kPending>
  __device__ __forceinline__ void wait_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // --- fragments: of four matrices of 8 x 8, whose rows start where the lanes say (rows.h)
  __device__ __forceinline__ void load_matrices(uint32_t row, uint32_t (&r)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row))
                 : "memory");
  }
  __device__ __forceinline__ void load_transposed(uint32_t row, uint32_t (&r)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row))
                 : "memory");
  }

  // The larger of either half in bf16, NaN if one of them is.
  __device__ __forceinline__ uint32_t max_bf16(uint32_t a, uint32_t b) const {
    uint32_t both;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
  }

  // --- single values in shared memory
  __device__ __forceinline__ void put(uint32_t to, float x) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address(to)), "f"(x) : "memory");
  }
  __device__ __forceinline__ float get(uint32_t from) const {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address(from)) : "memory");
    return x;
  }
  __device__ __forceinline__ uint32_t get_word(uint32_t from) const {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address(from)) : "memory");
    return x;
  }
};

}  // namespace pixeldiff::ampere
