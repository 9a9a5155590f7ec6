// Enough of CUDA to run csrc/blocks.cu on a CPU, one thread block after the other, warp after warp: each lane is a
// coroutine, and a shuffle is where the lanes of a warp meet. Included before the source, whose inline PTX has become
// calls of ptx_load and ptx_store. What this cannot show: races, memory order, anything about speed.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
using std::min;

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, gridDim;

template <class... Words>
void ptx_load(unsigned long long from, unsigned grain, Words&... words) {
  if (from % grain) std::abort();  // as a GPU would
  const unsigned each = grain / sizeof...(Words);
  unsigned i = 0;
  ((words = 0, std::memcpy(&words, reinterpret_cast<const char*>(from) + each * i++, each)), ...);
}

template <class... Words>
void ptx_store(unsigned long long to, unsigned grain, const Words&... words) {
  if (to % grain) std::abort();
  const unsigned each = grain / sizeof...(Words);
  unsigned i = 0;
  (std::memcpy(reinterpret_cast<char*>(to) + each * i++, &words, each), ...);
}

static inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }

// ---- a warp

static constexpr unsigned LANES = 32;
static ucontext_t scheduler, lanes[LANES];
static unsigned lane_now;
static bool ended[LANES];
static unsigned long long meeting[LANES];
static void (*lane_body)();

static void run_lane() {
  lane_body();
  ended[lane_now] = true;
  swapcontext(&lanes[lane_now], &scheduler);
}

static unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, unsigned offset) {
  if (mask != 0xFFFFFFFFu) std::abort();
  const unsigned lane = lane_now;
  meeting[lane] = value;
  swapcontext(&lanes[lane], &scheduler);  // until every lane has written
  const unsigned long long other = meeting[lane ^ offset];
  swapcontext(&lanes[lane], &scheduler);  // until every lane has read
  return other;
}

static void run_grid(unsigned grid, unsigned threads, void (*body)()) {
  constexpr size_t STACK = 1 << 16;
  static std::vector<char> stacks(STACK * LANES);
  lane_body = body;
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
    for (unsigned warp = 0; warp < threads / LANES; warp++) {
      for (unsigned i = 0; i < LANES; i++) {
        getcontext(&lanes[i]);
        lanes[i].uc_stack.ss_sp = &stacks[STACK * i];
        lanes[i].uc_stack.ss_size = STACK;
        lanes[i].uc_link = nullptr;
        ended[i] = false;
        makecontext(&lanes[i], run_lane, 0);
      }
      for (bool more = true; more;) {
        more = false;
        for (lane_now = 0; lane_now < LANES; lane_now++) {
          if (ended[lane_now]) continue;
          threadIdx.x = warp * LANES + lane_now;
          swapcontext(&scheduler, &lanes[lane_now]);
          more = more || !ended[lane_now];
        }
      }
    }
  }
}
