// A block of threads on a CPU, or a cluster of blocks, for kernels written against
// csrc/cuda/hopper/device.cuh.
//
// Every thread is a fiber; which of them runs next, and when a copy or a product that was only
// issued is carried out, is drawn from a seed. What a thread may not rely on is made to fail: a
// copy's target holds NaN until its bytes arrive, an accumulator holds NaN until its product is
// done, products read their operands late, ordinary stores stay unseen by the tensor cores until
// they are published. Layouts are written here from the PTX ISA, not with the headers of the
// kernel.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/hopper/tensor_map.h"

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& what) { throw Error(what); }

// What goes wrong on purpose, to see that it is noticed.
enum Fault {
  kNone,
  kSkipWait,       // waits for the barriers at [low, high) do not wait
  kDropArrival,    // one arrival at a barrier in [low, high) is lost
  kNoProxyFence,   // ordinary stores are not published
  kNoProductWait,  // waits for products do not wait
  kOtherSwizzle,   // the copy engine swizzles rows of another width
  kShortCopy,      // fewer bytes are announced than arrive
  kWeakWait,       // a thread's waits [low, high) for its own copies leave one group under way
  kSkipSync,       // the block's barriers that a thread comes to [low, high)-th are none
  kOtherColumn,    // fragments hold the columns of the next lane
};

inline float to_float(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                          : std::ldexp(static_cast<float>(mantissa), -24));
}

inline uint16_t round_to(float x, bool bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bf16) {
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  if (x != x) return 0x7fff;
  const uint16_t sign = bits >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < 6.103515625e-05f)  // subnormal: nearbyint rounds to even
    return sign | static_cast<uint16_t>(std::nearbyint(a * 16777216.0f));
  const uint32_t kept = bits & 0x7fffffff;
  return sign | static_cast<uint16_t>((kept + 0xfff + (kept >> 13 & 1) - (112u << 23)) >> 13);
}

// e4m3: 4 bits of exponent, 3 of mantissa, no infinity, one NaN of each sign.
inline float from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float sign = bits >> 7 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return NAN;
  return sign * (exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                          : std::ldexp(static_cast<float>(mantissa), -9));
}
// cvt.rn.satfinite.e4m3x2.f32
inline uint8_t to_e4m3(float x) {
  if (x != x) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float a = std::fabs(x);
  if (a >= 448.0f) return sign | 0x7e;
  int exponent;
  std::frexp(a, &exponent);  // a < 2^exponent
  const int step = std::max(exponent - 4, -9);
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(a, -step)), step);
  if (rounded < 0.015625f) return sign | static_cast<uint8_t>(std::ldexp(rounded, 9));
  std::frexp(rounded, &exponent);
  const int mantissa = static_cast<int>(std::ldexp(rounded, 4 - exponent)) - 8;
  return sign | static_cast<uint8_t>((exponent + 6) << 3 | mantissa);
}

// c + the products as Hopper adds them up in e4m3 (DeepSeek-V3, arXiv 2412.19437, section 3.5.2):
// moved to the largest exponent, then cut off after 14 bits, the accumulator too.
inline float add_up_14_bits(float c, const float (&products)[32]) {
  int largest = -1000;
  bool finite = std::isfinite(c);
  const auto see = [&](float x) {
    int exponent;
    std::frexp(x, &exponent);
    if (x != 0) largest = std::max(largest, exponent);
    finite &= std::isfinite(x);
  };
  see(c);
  for (const float x : products) see(x);
  double sum = 0;
  if (!finite) {
    for (const float x : products) sum += x;
    return static_cast<float>(c + sum);
  }
  const auto cut = [&](float x) {
    return std::trunc(std::ldexp(static_cast<double>(x), 14 - largest));
  };
  sum = cut(c);
  for (const float x : products) sum += cut(x);
  return static_cast<float>(std::ldexp(sum, largest - 14));
}

constexpr uint16_t kPoison = 0x7fff;  // NaN in bf16 and in fp16, and of either byte in e4m3

struct Map {
  pixeldiff::hopper::TensorMapSpec spec;
};

struct Product {  // wgmma of one warp: 16 rows of the 64
  int n;
  bool bf16, add, from_registers, e4m3;
  uint64_t a, b;
  float* d[32];
  const uint32_t* fragment[32];
  uint32_t window;  // where the shared memory of the warp's block lies among the cluster's
};

struct Group {
  std::vector<Product> products;
};

class Block;

// What the kernel sees: one thread.
class Thread {
 public:
  using TensorMap = Map;

  Thread(Block& block, int id) : block_(block), id_(id) {}

  int thread() const;
  int block() const;
  int blocks() const;
  uint32_t address(uint32_t offset) const;

  void barrier_init(uint32_t barrier, int arrivals);
  void publish_barriers();
  void arrive(uint32_t barrier);
  void arrive_and_expect(uint32_t barrier, uint32_t bytes);
  void wait(uint32_t barrier, uint32_t parity);
  void load_box(const Map& map, uint32_t to, uint32_t barrier, int channel, int head, int row,
                int image);
  void publish_to_async();
  void store_zero16(uint32_t to);

  int rank() const;
  void sync_cluster();
  void arrive_at(int rank, uint32_t barrier);
  void load_box_for(uint16_t ranks, const Map& map, uint32_t to, uint32_t barrier, int channel,
                    int head, int row, int image);

  void wgmma_fence();
  void wgmma_commit();
  template <int kPending, int n>
  void wgmma_wait(float (&)[n]) {
    wait_products(kPending);
  }
  template <int n, int k>
  void wgmma_wait_after(float, float (&)[n], uint32_t (&)[k]) {
    wait_products(0);
  }
  template <int kPending>
  void wgmma_wait() {
    wait_products(kPending);
  }
  template <bool kBf16, int n>
  void wgmma_shared(float (&d)[n], uint64_t a, uint64_t b, bool add) {
    issue(n * 2, kBf16, add, a, b, d, nullptr);
  }
  template <bool kBf16, int n>
  void wgmma_registers(float (&d)[n], const uint32_t* a, uint64_t b) {
    issue(n * 2, kBf16, true, 0, b, d, a);
  }
  template <int n>
  void wgmma_shared_e4m3(float (&d)[n], uint64_t a, uint64_t b, bool add) {
    issue(n * 2, false, add, a, b, d, nullptr, true);
  }
  template <int n>
  void wgmma_registers_e4m3(float (&d)[n], const uint32_t* a, uint64_t b, bool add) {
    issue(n * 2, false, add, 0, b, d, a, true);
  }

  // Of csrc/cuda/ampere/device.cuh.
  int thread_again() const { return thread(); }
  void copy16(uint32_t to, const char* from, bool there);
  void commit_copies();
  template <int kPending>
  void wait_copies() {
    wait_own_copies(kPending);
  }
  void load_matrices(uint32_t row, uint32_t (&r)[4]) { load_fragments(row, false, r); }
  void load_transposed(uint32_t row, uint32_t (&r)[4]) { load_fragments(row, true, r); }
  void put(uint32_t to, float x);
  float get(uint32_t from) const;
  uint32_t get_word(uint32_t from) const;
  uint32_t max_bf16(uint32_t a, uint32_t b) const {
    uint32_t both = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const float x = max(to_float(static_cast<uint16_t>(a >> shift), true),
                          to_float(static_cast<uint16_t>(b >> shift), true));
      both |= static_cast<uint32_t>(round_to(x, true)) << shift;
    }
    return both;
  }
  template <bool kBf16>
  void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    const uint32_t operands[6] = {a[0], a[1], a[2], a[3], b0, b1};
    multiply_in_warp(kBf16, operands, d);
  }

  template <int n>
  void release_registers() {}
  template <int n>
  void claim_registers() {}
  void sync_block();
  void sync_warp() { collect(0); }
  void named_sync(int barrier, int threads);
  void named_arrive(int barrier, int threads);
  float shuffle_xor(float x, int lanes);
  uint32_t shuffle(uint32_t x, int lane) { return collect(x)[lane]; }
  bool any(bool x) { return ballot(x) != 0; }
  uint32_t ballot(bool x);

  float max(float a, float b) const { return a != a || b != b ? NAN : a > b ? a : b; }
  float exp2(float x) const {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // NaN stays
  }
  float log2(float x) const { return std::log2(x); }
  float reciprocal(float x) const { return 1.0f / x; }
  float rsqrt(float x) const { return 1.0f / std::sqrt(x); }
  template <bool kBf16>
  uint32_t pack(float low, float high) const {
    return round_to(low, kBf16) | static_cast<uint32_t>(round_to(high, kBf16)) << 16;
  }

  float multiply(float a, float b) const { return a * b; }
  uint32_t pack_e4m3(float a, float b, float c, float d) const {
    return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 |
           static_cast<uint32_t>(to_e4m3(d)) << 24;
  }
  template <bool kBf16>
  void unpack(uint32_t both, float& low, float& high) const {
    low = to_float(static_cast<uint16_t>(both), kBf16);
    high = to_float(static_cast<uint16_t>(both >> 16), kBf16);
  }
  float divide(float a, float b) const { return a / b; }
  float inverse_root(float x) const { return 1.0f / std::sqrt(x); }

  uint8_t load(const uint8_t* p) const;
  uint32_t load(const uint32_t* p) const;
  float load(const float* p) const;
  template <pixeldiff::DType kType, int n>
  void load(const char* p, float (&x)[n]) const {
    constexpr int kSize = kType == pixeldiff::DType::f32 ? 4 : 2;
    check_load(p, n * kSize, std::min(n * kSize, 16));
    for (int i = 0; i < n; ++i) {
      uint16_t bits;
      if constexpr (kSize == 4) {
        std::memcpy(&x[i], p + 4 * i, 4);
      } else {
        std::memcpy(&bits, p + 2 * i, 2);
        x[i] = to_float(bits, kType == pixeldiff::DType::bf16);
      }
    }
  }
  void store(char* p, uint32_t a, uint32_t b) const;
  void store(char* p, uint32_t value) const;
  void store_low(char* p, uint32_t value) const { store_all(p, &value, 2); }  // little endian
  void store(float* p, float value) const;
  template <int n>
  void load_floats(const float* p, float* to) const {
    load_all(p, to, 4 * n);
  }
  template <int n>
  void load_words(const char* p, uint32_t* to) const {
    load_all(p, to, 4 * n);
  }
  template <int n>
  void store_words(char* p, const uint32_t* from) const {
    store_all(p, from, 4 * n);
  }

 private:
  const std::vector<uint32_t>& collect(uint32_t value);
  void issue(int n, bool bf16, bool add, uint64_t a, uint64_t b, float* d, const uint32_t* fragment,
             bool e4m3 = false);
  void check_load(const void* p, int64_t bytes, int64_t alignment) const;
  void wait_products(int pending);
  void wait_own_copies(int pending);
  void load_fragments(uint32_t row, bool transposed, uint32_t (&r)[4]);
  void multiply_in_warp(bool bf16, const uint32_t (&operands)[6], float* d);
  void load_all(const void* p, void* to, size_t bytes) const;
  void store_all(char* p, const void* from, size_t bytes) const;
  int64_t here(uint32_t barrier) const;
  uint32_t window() const;

  Block& block_;
  int id_;
};

// Places in memory the kernel may touch.
struct Ranges {
  std::vector<std::pair<const char*, const char*>> writable, readable, copyable;
};

class Block {
 public:
  // `threads` and `shared_bytes` of each block of the cluster, `index` of its first.
  Block(int threads, uint32_t shared_bytes, int index, int count, uint64_t seed, Fault fault,
        uint32_t low, uint32_t high, const Ranges& ranges, int cluster = 1)
      : index_(index),
        count_(count),
        threads_(threads),
        cluster_(cluster),
        shared_bytes_(shared_bytes),
        fault_(fault),
        low_(low),
        high_(high),
        ranges_(ranges),
        state_(mixed(seed)),
        slow_(draw(4)),
        copies_wait_(slow_ == 1 || slow_ == 2 ? 400 : 1),
        products_wait_(slow_ == 3 ? 400 : 1),
        generic_(cluster * shared_bytes / 2, kPoison),
        async_(cluster * shared_bytes / 2, kPoison),
        warps_(cluster * threads / 32),
        fibers_(cluster * threads) {}

  bool keeps_14_bits = false;  // of sums of e4m3 products; else they are fp32

  void run(const std::function<void(Thread&)>& kernel) {
    kernel_ = &kernel;
    for (int id = 0; id < static_cast<int>(fibers_.size()); ++id) {
      Fiber& fiber = fibers_[id];
      fiber.stack = std::make_unique<char[]>(kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 3,
                  static_cast<unsigned>(self), static_cast<unsigned>(self >> 32), id);
      ready_.push_back(id);
    }
    int running = static_cast<int>(fibers_.size());
    while (running > 0) {
      const bool engine = !copies_.empty() || products_under_way_ > 0;
      if (ready_.empty() && !engine) fail("deadlock: " + where());
      if (engine && (ready_.empty() || draw(4) == 0)) {
        advance_engines(ready_.empty());
        if (ready_.empty()) continue;
      }
      const int at = draw(static_cast<int>(ready_.size()));
      current_ = ready_[at];
      ready_[at] = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &fibers_[current_].context);
      if (!error_.empty()) fail(error_);
      if (fibers_[current_].done) --running;
    }
    if (!copies_.empty()) fail("a copy was still under way at the end");
    for (const Fiber& fiber : fibers_) {
      bool any = !fiber.open.empty();
      for (const auto& group : fiber.own_groups) any |= !group.empty();
      if (any) fail("a thread's copy was still under way at the end");
    }
    if (products_under_way_) fail("a product was still under way at the end");
    for (const auto& [id, named] : named_)
      if (named.arrived) fail("an arrival at a named barrier was left over");
    for (const auto& [at, barrier] : barriers_)
      if (barrier.bytes) fail("a barrier was left waiting for bytes");
  }

 private:
  friend class Thread;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kStack = 128 << 10;  // every variable has its guards
#else
  static constexpr size_t kStack = 64 << 10;
#endif
  static constexpr uint32_t kStart = 5 << 10;  // not where a larger power of two would be

  struct OwnCopy {  // 16 bytes, by a thread itself
    uint32_t to;
    const char* from;  // nullptr: zeros
  };
  struct Accumulator {
    float* d = nullptr;
    std::vector<float> values;  // what it will hold
    int products = 0;           // under way
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const char* doing = "";
    uint32_t on = 0;
    std::vector<uint32_t> unpublished;             // addresses of pieces of 16 bytes
    std::vector<OwnCopy> open;                     // not yet a group
    std::vector<std::vector<OwnCopy>> own_groups;  // in order
    uint32_t syncs = 0, waits = 0;
    std::vector<Accumulator> accumulators;
  };
  struct Barrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<int> waiting;
  };
  struct Named {
    int arrived = 0, threads = 0;
    std::vector<int> waiting;
  };
  struct Warp {
    std::vector<uint32_t> given = std::vector<uint32_t>(32), result;
    int arrived = 0;
    std::vector<int> waiting;
    bool fenced = false;
    Product next;
    int issuing = 0, committing = 0;
    Group open;
    std::vector<Group> groups;  // committed, in order
    std::vector<int> waiting_for_products;
    uint32_t operands[32][6];
    float sums[32][4];
    int multiplying = 0;
  };
  struct Copy {
    Map map;
    uint32_t to;
    int64_t barrier;
    int at[4];
    uint32_t next_row = 0;
    bool poisoned = false;
  };

  static void enter(unsigned low, unsigned high, int id) {
    Block& block =
        *reinterpret_cast<Block*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    try {
      Thread thread(block, id);
      (*block.kernel_)(thread);
      if (!block.fibers_[id].unpublished.empty() && block.fault_ == kNone)
        fail("stores to shared memory were never published");
    } catch (const std::exception& e) {
      block.error_ = e.what();
    }
    block.fibers_[id].done = true;
    swapcontext(&block.fibers_[id].context, &block.main_);
  }

  static uint64_t mixed(uint64_t seed) {
    seed += 0x9e3779b97f4a7c15u;
    seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u;
    seed = (seed ^ seed >> 27) * 0x94d049bb133111ebu;
    return (seed ^ seed >> 31) | 1;
  }

  int draw(int below) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<int>((state_ >> 11) % static_cast<uint64_t>(below));
  }

  // This thread goes on when somebody wakes it.
  void sleep(std::vector<int>& waiting, const char* doing, uint32_t on) {
    Fiber& fiber = fibers_[current_];
    fiber.doing = doing;
    fiber.on = on;
    waiting.push_back(current_);
    swapcontext(&fiber.context, &main_);
    fiber.doing = "";
  }
  void wake(std::vector<int>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  // Others may come first.
  void yield() {
    if (draw(4)) return;
    ready_.push_back(current_);
    swapcontext(&fibers_[current_].context, &main_);
  }

  std::string where() const {
    std::map<std::string, int> places;
    for (const Fiber& fiber : fibers_)
      if (!fiber.done) ++places[std::string(fiber.doing) + " " + std::to_string(fiber.on)];
    std::string all;
    for (const auto& [place, count] : places)
      all += (all.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
    return all;
  }

  bool faulty(Fault fault, uint32_t barrier) const {
    return fault_ == fault && barrier >= low_ && barrier < high_;
  }

  // A barrier's address, and the rank of its block above it.
  static int64_t key(int rank, uint32_t at) { return static_cast<int64_t>(rank) << 32 | at; }
  bool over(int rank) const {
    for (int id = rank * threads_; id < (rank + 1) * threads_; ++id)
      if (!fibers_[id].done) return false;
    return true;
  }
  Barrier& barrier(int64_t at) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end() || !published_) fail("a barrier was used before it was there");
    return found->second;
  }
  void settle(Barrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at a barrier than it expects");
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    wake(barrier.waiting);
  }

  static uint32_t swizzled(uint32_t address, uint32_t width) {
    // Bits 4.. are the piece of 16 bytes; bits 7.. are added to them without carry.
    const uint32_t bits = width == 128 ? 3 : width == 64 ? 2 : 1;
    const uint32_t mask = (1u << bits) - 1;
    return address ^ ((address >> 7 & mask) << 4);
  }
  uint16_t& element(std::vector<uint16_t>& memory, uint32_t address) {
    const uint32_t offset = address - kStart;
    if (address < kStart || offset / 2 >= memory.size()) fail("outside of shared memory");
    return memory[offset / 2];
  }

  uint8_t byte(std::vector<uint16_t>& memory, uint32_t address) {
    return static_cast<uint8_t>(element(memory, address) >> (address % 2 * 8));
  }

  void advance_engines(bool alone) {
    const int copies = static_cast<int>(copies_.size());
    const bool copy = copies && draw(copies_wait_) == 0;
    const bool product = products_under_way_ && draw(products_wait_) == 0;
    // Every other time the latest copy: the first ones then come last.
    if (copy && (!product || draw(2)))
      advance_copy(draw(2) ? copies - 1 : draw(copies));
    else if (product || (alone && products_under_way_))
      advance_product(draw(static_cast<int>(warps_.size())));
    else if (alone)
      advance_copy(draw(copies));
  }

  void advance_copy(int index) {
    Copy& copy = copies_[index];
    const auto& spec = copy.map.spec;
    const uint32_t size = spec.element, width = spec.box[0] * size,
                   plane = spec.box[1] * spec.box[2], rows = plane * spec.box[3];
    if (!copy.poisoned) poison(copy);
    const uint32_t until = std::min(rows, copy.next_row + 1 + draw(static_cast<int>(rows)));
    for (; copy.next_row < until; ++copy.next_row) {
      for (uint32_t column = 0; column < spec.box[0]; ++column) {
        const int64_t at[4] = {copy.at[0] + column, copy.at[1] + copy.next_row % spec.box[1],
                               copy.at[2] + copy.next_row % plane / spec.box[1],
                               copy.at[3] + copy.next_row / plane};
        bool inside = true;
        int64_t offset = at[0] * size;
        for (int axis = 0; axis < 4; ++axis) {
          inside &= at[axis] >= 0 && at[axis] < static_cast<int64_t>(spec.size[axis]);
          if (axis) offset += at[axis] * static_cast<int64_t>(spec.stride[axis - 1]);
        }
        uint16_t value = 0;
        if (inside) std::memcpy(&value, static_cast<const char*>(spec.data) + offset, size);
        const uint32_t other = width == 128 ? 64 : 128;
        const uint32_t to = swizzled(copy.to + copy.next_row * width + column * size,
                                     fault_ == kOtherSwizzle ? other : spec.swizzle);
        if (size == 1) {
          const int shift = to % 2 * 8;
          value = static_cast<uint16_t>((element(async_, to) & 0xff00 >> shift) | value << shift);
        }
        element(generic_, to) = element(async_, to) = value;
      }
    }
    if (copy.next_row < rows) return;
    if (over(static_cast<int>(copy.barrier >> 32))) fail("bytes arrived at a block that has ended");
    Barrier& full = barrier(copy.barrier);
    full.bytes -= static_cast<int64_t>(width) * rows;
    // Another block's copy may come before this one announced it.
    if (full.bytes < 0 && cluster_ == 1) fail("more bytes arrived than were announced");
    copies_.erase(copies_.begin() + index);
    settle(full);
  }

  void poison(Copy& copy) {
    const auto& box = copy.map.spec.box;
    const uint32_t elements = box[0] * box[1] * box[2] * box[3] * copy.map.spec.element / 2;
    for (uint32_t i = 0; i < elements; ++i)
      element(generic_, copy.to + 2 * i) = element(async_, copy.to + 2 * i) = kPoison;
    copy.poisoned = true;
  }

  void arrive_own(const OwnCopy& copy) {
    const uint32_t to = fault_ == kOtherSwizzle ? copy.to ^ (copy.to >> 7 & 1) << 4 : copy.to;
    uint16_t values[8] = {};
    if (copy.from != nullptr) std::memcpy(values, copy.from, 16);
    for (int i = 0; i < 8; ++i) element(generic_, to + 2 * i) = values[i];
  }

  // D of m16n8k16 without C, from the operands of a warp. PTX ISA, "Matrix Fragments for
  // mma.m16n8k16 with floating point type".
  static void carry_out(Warp& warp, bool bf16) {
    const auto half = [&](uint32_t word, int high) {
      return to_float(static_cast<uint16_t>(word >> 16 * high), bf16);
    };
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* given = warp.operands[lane];
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? lane / 4 : lane / 4 + 8;
        const int column = lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8);
        a[row][column] = half(given[i / 2], i & 1);
      }
      for (int i = 0; i < 4; ++i)
        b[lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8)][lane / 4] = half(given[4 + i / 2], i & 1);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        warp.sums[lane][i] = sum;
      }
  }

  // Products of a warp are carried out in order, a random few of them at a time.
  void advance_product(int index) {
    Warp& warp = warps_[index];
    for (Group& group : warp.groups) {
      if (group.products.empty()) continue;
      carry_out(group.products.front(), index);
      group.products.erase(group.products.begin());
      --products_under_way_;
      break;
    }
    while (!warp.groups.empty() && warp.groups.front().products.empty())
      warp.groups.erase(warp.groups.begin());
    wake(warp.waiting_for_products);
  }

  // Element (row, k) of an operand with K side by side, of (k, column) of one with N side by side.
  static uint32_t locate(uint64_t d, bool k_major, uint32_t mn, uint32_t k) {
    const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4,
                   stride = (d >> 32 & 0x3fff) << 4;
    if (d >> 49 & 7) fail("a descriptor with a base offset");
    const uint32_t mode = static_cast<uint32_t>(d >> 62);
    const uint32_t width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
    if (!width) fail("a descriptor without a swizzle");
    const uint32_t at = k_major ? mn % 8 * width + mn / 8 * stride + k * 2
                                : mn % (width / 2) * 2 + mn / (width / 2) * leading +
                                      k % 8 * width + k / 8 * stride;
    if (k_major && (start % width) + 32 > width) fail("16 elements of K beyond their row");
    return swizzled(start + at, width);
  }

  // Byte k, of 32, of row mn of an operand of e4m3.
  static uint32_t locate_byte(uint64_t d, uint32_t mn, uint32_t k) {
    const uint32_t start = (d & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    if (d >> 49 & 7) fail("a descriptor with a base offset");
    const uint32_t mode = static_cast<uint32_t>(d >> 62);
    const uint32_t width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
    if (!width) fail("a descriptor without a swizzle");
    if (start % width + 32 > width) fail("32 bytes of K beyond their row");
    return swizzled(start + mn % 8 * width + mn / 8 * stride + k, width);
  }

  void carry_out_e4m3(const Product& p, int warp) {
    const auto into = accumulators(p, warp);
    float a[16][32], b[32], products[32];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 32; ++k) {
        uint8_t bits;
        if (p.from_registers) {
          const int lane = row % 8 * 4 + k % 16 / 4, r = row / 8 + k / 16 * 2;
          bits = static_cast<uint8_t>(p.fragment[lane][r] >> (k % 4 * 8));
        } else {
          bits = byte(async_, locate_byte(p.a, 16 * (warp % 4) + row, k));
        }
        a[row][k] = from_e4m3(bits);
      }
    for (int column = 0; column < p.n; ++column) {
      for (int k = 0; k < 32; ++k) b[k] = from_e4m3(byte(async_, locate_byte(p.b, column, k)));
      for (int row = 0; row < 16; ++row) {
        const int lane = row % 8 * 4 + column % 8 / 2;
        const int i = column / 8 * 4 + row / 8 * 2 + column % 2;
        for (int k = 0; k < 32; ++k) products[k] = a[row][k] * b[k];
        float sum = p.add ? into[lane]->values[i] : 0.0f;
        if (keeps_14_bits)
          sum = add_up_14_bits(sum, products);
        else
          for (const float x : products) sum += x;
        into[lane]->values[i] = sum;
      }
    }
    show(into);
  }

  void carry_out(const Product& p, int warp) {
    if (p.e4m3) return carry_out_e4m3(p, warp);
    const auto into = accumulators(p, warp);
    float a[16][16];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) {
        uint16_t bits;
        if (p.from_registers) {
          const int lane = row % 8 * 4 + k % 8 / 2, r = row / 8 + k / 8 * 2;
          bits = static_cast<uint16_t>(p.fragment[lane][r] >> (k % 2 * 16));
        } else {
          bits = element(async_, locate(p.a, true, 16 * (warp % 4) + row, k) + p.window);
        }
        a[row][k] = to_float(bits, p.bf16);
      }
    for (int column = 0; column < p.n; ++column) {
      float b[16];
      for (int k = 0; k < 16; ++k)
        b[k] =
            to_float(element(async_, locate(p.b, !p.from_registers, column, k) + p.window), p.bf16);
      for (int row = 0; row < 16; ++row) {
        const int lane = row % 8 * 4 + column % 8 / 2;
        const int i = column / 8 * 4 + row / 8 * 2 + column % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
        float& value = into[lane]->values[i];
        value = p.add ? value + sum : sum;
      }
    }
    show(into);
  }
  // An accumulator holds NaN until all products into it are done.
  void hide(int id, float* d, int count) {
    auto& all = fibers_[id].accumulators;
    Accumulator* mine = nullptr;
    for (Accumulator& other : all) {
      const bool same = other.d == d && static_cast<int>(other.values.size()) == count;
      if (other.products && !same && other.d < d + count && d < other.d + other.values.size())
        fail("products into accumulators that overlap");
      if (same || (mine == nullptr && !other.products)) mine = &other;
    }
    if (mine == nullptr) mine = &all.emplace_back();
    if (!mine->products) {
      mine->d = d;
      mine->values.assign(d, d + count);
    }
    ++mine->products;
    std::fill(d, d + count, NAN);
  }
  // Of the lanes of a warp.
  std::array<Accumulator*, 32> accumulators(const Product& p, int warp) {
    std::array<Accumulator*, 32> found{};
    for (int lane = 0; lane < 32; ++lane) {
      for (Accumulator& one : fibers_[32 * warp + lane].accumulators)
        if (one.products && one.d == p.d[lane]) found[lane] = &one;
      if (found[lane] == nullptr) fail("a product without an accumulator");
      const float* d = p.d[lane];
      if (!std::all_of(d, d + p.n / 2, [](float x) { return x != x; }))
        fail("an accumulator was written to while its product was under way");
    }
    return found;
  }
  // Later products into the same accumulator still hide the values.
  static void show(const std::array<Accumulator*, 32>& accumulators) {
    for (Accumulator* one : accumulators)
      if (--one->products == 0) std::copy(one->values.begin(), one->values.end(), one->d);
  }

  int index_, count_, threads_, cluster_;
  uint32_t shared_bytes_;
  Fault fault_;
  uint32_t low_, high_;
  const Ranges& ranges_;
  uint64_t state_;
  // One in so many chances is taken as long as anything else can go on: in half of the runs copies
  // are slow, in a quarter products.
  int slow_, copies_wait_, products_wait_;
  std::vector<uint16_t> generic_, async_;  // shared memory, as threads and as the engines see it
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  const std::function<void(Thread&)>* kernel_ = nullptr;
  ucontext_t main_;
  std::string error_;
  int current_ = 0;
  std::vector<int> ready_;
  std::map<int64_t, Barrier> barriers_;
  bool published_ = false, dropped_ = false;
  std::map<int, Named> named_;
  std::map<int, Named> all_;  // of each block
  Named of_cluster_;
  std::vector<Copy> copies_;
  int products_under_way_ = 0;
  std::map<std::pair<int, int>, std::pair<uint64_t, uint64_t>> issued_;
  std::vector<int> issue_count_ = std::vector<int>(64);
};

inline int Thread::thread() const { return id_ % block_.threads_; }
inline int Thread::rank() const { return id_ / block_.threads_; }
inline int Thread::block() const { return block_.index_ + rank(); }
inline int Thread::blocks() const { return block_.count_; }
inline uint32_t Thread::address(uint32_t offset) const { return Block::kStart + offset; }
inline uint32_t Thread::window() const { return rank() * block_.shared_bytes_; }
inline int64_t Thread::here(uint32_t barrier) const { return Block::key(rank(), barrier); }

inline void Thread::barrier_init(uint32_t at, int arrivals) {
  if (at % 8) fail("a barrier at no multiple of 8");
  Block::Barrier barrier;
  barrier.count = barrier.pending = arrivals;
  block_.barriers_[here(at)] = barrier;
}
inline void Thread::publish_barriers() { block_.published_ = true; }

inline void Thread::arrive(uint32_t at) {
  block_.yield();
  if (block_.faulty(kDropArrival, at) && !block_.dropped_) {
    block_.dropped_ = true;
    return;
  }
  Block::Barrier& barrier = block_.barrier(here(at));
  --barrier.pending;
  block_.settle(barrier);
}
inline void Thread::arrive_at(int rank, uint32_t at) {
  block_.yield();
  if (block_.faulty(kDropArrival, at) && !block_.dropped_) {
    block_.dropped_ = true;
    return;
  }
  if (rank < 0 || rank >= block_.cluster_) fail("an arrival at a block outside of the cluster");
  if (block_.over(rank)) fail("an arrival at a block that has ended");
  Block::Barrier& barrier = block_.barrier(Block::key(rank, at));
  --barrier.pending;
  block_.settle(barrier);
}
inline void Thread::sync_cluster() {
  Block::Named& all = block_.of_cluster_;
  if (++all.arrived == static_cast<int>(block_.fibers_.size())) {
    all.arrived = 0;
    block_.wake(all.waiting);
  } else {
    block_.sleep(all.waiting, "at the cluster's barrier", 0);
  }
}
inline void Thread::arrive_and_expect(uint32_t at, uint32_t bytes) {
  block_.yield();
  Block::Barrier& barrier = block_.barrier(here(at));
  barrier.bytes += block_.fault_ == kShortCopy ? bytes / 2 : bytes;
  --barrier.pending;
  block_.settle(barrier);
}
inline void Thread::wait(uint32_t at, uint32_t parity) {
  block_.yield();
  Block::Barrier& barrier = block_.barrier(here(at));
  if (block_.faulty(kSkipWait, at)) return;
  while (barrier.phase == parity) block_.sleep(barrier.waiting, "waiting for barrier", at);
}

inline void Thread::load_box(const Map& map, uint32_t to, uint32_t barrier, int channel, int head,
                             int row, int image) {
  load_box_for(static_cast<uint16_t>(1u << rank()), map, to, barrier, channel, head, row, image);
}
inline void Thread::load_box_for(uint16_t ranks, const Map& map, uint32_t to, uint32_t barrier,
                                 int channel, int head, int row, int image) {
  const auto& spec = map.spec;
  if (to % (8 * spec.swizzle)) fail("a box that does not start where its swizzle does");
  if (spec.swizzle != spec.box[0] * spec.element) fail("a box that is not as wide as its swizzle");
  for (const uint32_t elements : spec.box)
    if (elements < 1 || elements > 256) fail("a box of other shape");
  if (ranks == 0 || ranks >> block_.cluster_) fail("a copy for blocks outside of the cluster");
  for (int rank = 0; rank < block_.cluster_; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block::Copy copy{map,
                     address(to) + rank * block_.shared_bytes_,
                     Block::key(rank, barrier),
                     {channel, head, row, image}};
    if (block_.draw(2)) block_.poison(copy);
    block_.copies_.push_back(copy);
  }
  block_.yield();
}

inline void Thread::store_zero16(uint32_t to) {
  if (to % 16) fail("16 bytes stored at no multiple of 16");
  for (int i = 0; i < 8; ++i) block_.element(block_.generic_, address(to) + window() + 2 * i) = 0;
  block_.fibers_[id_].unpublished.push_back(address(to) + window());
}
inline void Thread::publish_to_async() {
  block_.yield();
  auto& unpublished = block_.fibers_[id_].unpublished;
  if (block_.fault_ == kNoProxyFence) return;
  for (const uint32_t at : unpublished)
    for (int i = 0; i < 8; ++i)
      block_.element(block_.async_, at + 2 * i) = block_.element(block_.generic_, at + 2 * i);
  unpublished.clear();
}

inline void Thread::wgmma_fence() {
  sync_warp();
  block_.warps_[id_ / 32].fenced = true;
}

inline void Thread::issue(int n, bool bf16, bool add, uint64_t a, uint64_t b, float* d,
                          const uint32_t* fragment, bool e4m3) {
  Block::Warp& warp = block_.warps_[id_ / 32];
  if (!warp.fenced) fail("a product was issued without a fence since the last wait");
  Product& p = warp.next;
  if (warp.issuing && (p.a != a || p.b != b || p.n != n || p.add != add))
    fail("the lanes of a warp issue different products");
  const int lane = id_ % 32;
  p.n = n;
  p.bf16 = bf16;
  p.e4m3 = e4m3;
  p.add = add;
  p.from_registers = fragment != nullptr;
  p.a = a;
  p.b = b;
  p.d[lane] = d;
  p.fragment[lane] = fragment;
  p.window = window();
  block_.hide(id_, d, n / 2);
  if (++warp.issuing == 32) {
    warp.issuing = 0;
    warp.open.products.push_back(p);
    // The four warps of a warpgroup issue the same.
    const std::pair<int, int> place(id_ / 128, block_.issue_count_[id_ / 32]++);
    const auto [found, fresh] = block_.issued_.try_emplace(place, std::make_pair(a, b));
    if (!fresh && found->second != std::make_pair(a, b))
      fail("the warps of a warpgroup issue different products");
  }
  sync_warp();
  block_.yield();
}

inline void Thread::wgmma_commit() {
  Block::Warp& warp = block_.warps_[id_ / 32];
  if (++warp.committing == 32) {
    warp.committing = 0;
    warp.groups.push_back(warp.open);
    block_.products_under_way_ += static_cast<int>(warp.open.products.size());
    warp.open.products.clear();
  }
  sync_warp();
}

inline void Thread::wait_products(int pending) {
  Block::Warp& warp = block_.warps_[id_ / 32];
  sync_warp();
  warp.fenced = false;
  if (block_.fault_ == kNoProductWait) return;
  while (static_cast<int>(warp.groups.size()) > pending)
    block_.sleep(warp.waiting_for_products, "waiting for products of warp", id_ / 32);
}

// --- csrc/cuda/ampere/device.cuh

inline void Thread::copy16(uint32_t to, const char* from, bool there) {
  if (to % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16))
    fail("16 bytes copied at no multiple of 16");
  bool inside = !there;
  for (const auto& [low, high] : block_.ranges_.copyable)
    inside |= from >= low && from + 16 <= high;
  if (!inside) fail("a copy from outside of the operands");
  const Block::OwnCopy copy{address(to), there ? from : nullptr};
  if (block_.draw(4) == 0) {  // at once
    block_.arrive_own(copy);
    return;
  }
  // Before it arrives, or only then: both are possible.
  if (block_.draw(2))
    for (int i = 0; i < 8; ++i) block_.element(block_.generic_, address(to) + 2 * i) = kPoison;
  block_.fibers_[id_].open.push_back(copy);
}
inline void Thread::commit_copies() {
  Block::Fiber& fiber = block_.fibers_[id_];
  fiber.own_groups.push_back(fiber.open);
  fiber.open.clear();
  block_.yield();
}
inline void Thread::wait_own_copies(int pending) {
  block_.yield();
  Block::Fiber& fiber = block_.fibers_[id_];
  auto& groups = fiber.own_groups;
  const size_t left = pending + block_.faulty(kWeakWait, fiber.waits++);
  while (groups.size() > left) {
    for (const auto& copy : groups.front()) block_.arrive_own(copy);
    groups.erase(groups.begin());
  }
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix": lanes 8 i to 8 i + 7 hold the addresses
// of matrix i's rows; register i of a lane is elements 2 (lane % 4) and the next of row lane / 4;
// transposed, of column lane / 4.
inline void Thread::load_fragments(uint32_t row, bool transposed, uint32_t (&r)[4]) {
  if (row % 16) fail("a row of a matrix at no multiple of 16");
  const auto& rows = collect(address(row));
  const int lane = (id_ + (block_.fault_ == kOtherColumn)) % 32;
  for (int i = 0; i < 4; ++i) {
    uint32_t banks = 0;
    for (int at = 0; at < 8; ++at) banks |= 1u << rows[8 * i + at] / 16 % 8;
    if (banks != 255) fail("rows of a matrix in the same banks");
    r[i] = 0;
    for (int j = 0; j < 2; ++j) {
      const int along = lane % 4 * 2 + j, across = lane / 4;
      const uint32_t at =
          transposed ? rows[8 * i + along] + 2 * across : rows[8 * i + across] + 2 * along;
      r[i] |= static_cast<uint32_t>(block_.element(block_.generic_, at)) << 16 * j;
    }
  }
}

inline void Thread::put(uint32_t to, float x) {
  if (to % 4) fail("4 bytes stored at no multiple of 4");
  uint16_t halves[2];
  std::memcpy(halves, &x, 4);
  for (int i = 0; i < 2; ++i)
    block_.element(block_.generic_, address(to) + window() + 2 * i) = halves[i];
  block_.yield();
}
inline float Thread::get(uint32_t from) const {
  if (from % 4) fail("4 bytes read at no multiple of 4");
  uint16_t halves[2];
  for (int i = 0; i < 2; ++i)
    halves[i] = block_.element(block_.generic_, address(from) + window() + 2 * i);
  float x;
  std::memcpy(&x, halves, 4);
  return x;
}

inline uint32_t Thread::get_word(uint32_t from) const {
  if (from % 4) fail("4 bytes read at no multiple of 4");
  const uint32_t at = address(from) + window();
  return block_.element(block_.generic_, at) |
         static_cast<uint32_t>(block_.element(block_.generic_, at + 2)) << 16;
}

inline void Thread::multiply_in_warp(bool bf16, const uint32_t (&operands)[6], float* d) {
  Block::Warp& warp = block_.warps_[id_ / 32];
  std::copy(std::begin(operands), std::end(operands), warp.operands[id_ % 32]);
  if (++warp.multiplying == 32) {
    warp.multiplying = 0;
    Block::carry_out(warp, bf16);
  }
  sync_warp();
  for (int i = 0; i < 4; ++i) d[i] += warp.sums[id_ % 32][i];
}

inline void Thread::sync_block() {
  const uint32_t number = block_.fibers_[id_].syncs++;
  if (block_.faulty(kSkipSync, number)) return;
  Block::Named& all = block_.all_[rank()];
  if (++all.arrived == block_.threads_) {
    all.arrived = 0;
    block_.wake(all.waiting);
  } else {
    block_.sleep(all.waiting, "at the block's barrier", 0);
  }
}
inline void Thread::named_arrive(int id, int threads) {
  Block::Named& named = block_.named_[16 * rank() + id];
  if (named.arrived && named.threads != threads) fail("a named barrier of two sizes");
  named.threads = threads;
  if (++named.arrived == threads) {
    named.arrived = 0;
    block_.wake(named.waiting);
  }
}
inline void Thread::named_sync(int id, int threads) {
  Block::Named& named = block_.named_[16 * rank() + id];
  if (named.arrived && named.threads != threads) fail("a named barrier of two sizes");
  named.threads = threads;
  if (++named.arrived == threads) {
    named.arrived = 0;
    block_.wake(named.waiting);
  } else {
    block_.sleep(named.waiting, "at named barrier", id);
  }
}

inline const std::vector<uint32_t>& Thread::collect(uint32_t value) {
  Block::Warp& warp = block_.warps_[id_ / 32];
  warp.given[id_ % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.result = warp.given;
    block_.wake(warp.waiting);
  } else {
    block_.sleep(warp.waiting, "with part of warp", id_ / 32);
  }
  return warp.result;
}
inline float Thread::shuffle_xor(float x, int lanes) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = collect(bits)[id_ % 32 ^ lanes];
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t Thread::ballot(bool x) {
  const auto& all = collect(x);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
  return bits;
}

inline void Thread::check_load(const void* p, int64_t bytes, int64_t alignment) const {
  const auto at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("a read at no multiple of its size");
  for (const auto& [from, to] : block_.ranges_.readable)
    if (at >= from && at + bytes <= to) return;
  fail("a read outside of the arguments");
}
inline float Thread::load(const float* p) const {
  check_load(p, 4, 4);
  return *p;
}
inline uint8_t Thread::load(const uint8_t* p) const {
  for (const auto& [from, to] : block_.ranges_.readable)
    if (reinterpret_cast<const char*>(p) >= from && reinterpret_cast<const char*>(p) < to)
      return *p;
  fail("a read outside of the mask");
}
inline void Thread::load_all(const void* p, void* to, size_t bytes) const {
  check_load(p, static_cast<int64_t>(bytes), static_cast<int64_t>(bytes));
  std::memcpy(to, p, bytes);
}
inline uint32_t Thread::load(const uint32_t* p) const {
  check_load(p, 4, 4);
  return *p;
}
inline void check_store(const Ranges& ranges, const void* p, size_t bytes) {
  for (const auto& [from, to] : ranges.writable)
    if (static_cast<const char*>(p) >= from && static_cast<const char*>(p) + bytes <= to) return;
  fail("a store outside of the results");
}
inline void Thread::store(char* p, uint32_t a, uint32_t b) const {
  check_store(block_.ranges_, p, 8);
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("8 bytes stored at no multiple of 8");
  std::memcpy(p, &a, 4);
  std::memcpy(p + 4, &b, 4);
}
inline void Thread::store(char* p, uint32_t value) const {
  check_store(block_.ranges_, p, 4);
  if (reinterpret_cast<uintptr_t>(p) % 4) fail("4 bytes stored at no multiple of 4");
  std::memcpy(p, &value, 4);
}
inline void Thread::store_all(char* p, const void* from, size_t bytes) const {
  check_store(block_.ranges_, p, bytes);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a store at no multiple of its size");
  std::memcpy(p, from, bytes);
}
inline void Thread::store(float* p, float value) const {
  check_store(block_.ranges_, p, 4);
  *p = value;
}

}  // namespace emulator
