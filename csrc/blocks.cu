// Carries plans out (kvsdk/layout/plans.py): copies blocks between two KV caches, or a cache and a staging buffer, for
// all layers and blocks in one launch, and digests them on the way. kvsdk/kernels/cuda.py launches what is here;
// kvsdk/kernels/nvrtc.py compiles it at first use, so there are no includes. It defines
//   THREADS             threads of a thread block
//   CHUNK_BYTES         a page is cut into chunks of this size, a multiple of 8
//   COPY_ARGS_BYTES, FINISH_ARGS_BYTES, LAYER_BYTES   sizes of the structures below, as the host lays them out
//   LISTED_IDS          how many ids fit into the structure `Listed`
//
// A unit of work is a chunk (or a half or a quarter of one, where there are few) of one block's page of one layer, and
// belongs to one warp. So nothing waits at a barrier, tails are short, and neighbouring warps read different blocks of
// the same layer: different pages are in flight, and all of them lie in one layer's part of memory, which is what the
// TLB holds. A lane has UNROLL loads of 16 bytes in flight, a warp 4 KiB, 64 thread blocks of 512 threads 4 MiB; NVLink
// at 400 GB/s and 2 us needs 0.8 MiB.
//
// A digest takes four 64-bit multiplications for the two keys of 8 bytes, which depend on their index alone, and two of
// 32 by 64 bits for the bytes. A 64-bit multiplication is three or four IMADs, the shifts and XORs around them about 40
// more instructions: some 60 for 8 bytes. An SM issues 128 a clock, so at 1.7 GHz 64 SMs do at most 1.8 TB/s: NVLink needs a fifth of
// that. A table of keys would double the bytes that are loaded, and keys shared between several blocks would triple the
// pages in flight, to speed up what is not the limit.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// One layer of a plan.
struct Layer {
  u64 src_stride, dst_stride;  // bytes from one block to the next
  u32 page_bytes;              // payload of a block
  u32 run_bytes;               // the payload is cut into runs of this size
  u32 first_run, num_runs;     // in Copy::runs
};

// Offsets of a run from the block's first byte. Runs are in the order of the source's payload.
struct Run {
  u64 src, dst;
};

struct Chunk {
  u32 layer, first_byte;
};

struct Copy {
  const Layer* layers;
  const Run* runs;
  const Chunk* chunks;
  const u64* src_bases;  // address of block 0, a layer
  const u64* dst_bases;
  const int* src_ids;  // null: block i of the source is its block i
  const int* dst_ids;  // null: likewise
  const u8* skip;      // null, or a byte a block: blocks whose byte is not 0 are left out
  u64* sums;           // [layers][blocks]: the sums of the words times their keys are added to it
  u32 num_blocks, num_chunks;
  u32 split;  // a chunk is cut into 1 << split units
  u32 unused;
};

// The same, with the destinations' ids beside it: a launch takes them along, where a copy of its own would take the host
// as long as the launch.
struct Listed {
  Copy copy;
  int dst_ids[LISTED_IDS];
};

struct Finish {
  u64* sums;             // [layers][blocks]; left at 0, as the next kernel that adds to them needs them
  const u64* positions;  // of each block in its prompt
  const u64* expected;   // null, or the digests that the blocks should have
  u64* digests;          // null, or where they go
  u8* wrong;             // null, or a byte a block: 1 where the digest is not the expected one
  u8* wrong_too;         // null, or the same a second time: host memory is slow to read for a kernel that follows
  u32 num_layers, num_blocks;
};

static_assert(sizeof(Layer) == LAYER_BYTES, "Layer is laid out otherwise by the host");
static_assert(sizeof(Copy) == COPY_ARGS_BYTES, "Copy is laid out otherwise by the host");
static_assert(sizeof(Finish) == FINISH_ARGS_BYTES, "Finish is laid out otherwise by the host");
static_assert(CHUNK_BYTES % 64 == 0, "a quarter of a chunk must be whole 16-byte words");

constexpr u32 WARP = 32;
constexpr u32 UNROLL = 8;
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr u64 C1 = 0xBF58476D1CE4E5B9ull;
constexpr u64 C2 = 0x94D049BB133111EBull;
constexpr u64 LAYER_SEED = 0xD6E8FEB86659FD93ull;

// ---- loads and stores of GRAIN bytes

// What is read may be written by a peer, at any time before this kernel began: another GPU's memory over NVLink, or a
// staging buffer. A relaxed load of system scope is never served from this SM's L1, where a line of an earlier transfer
// may still lie. `ld.global.nc` would be: it promises that nobody ever writes the line.
template <u32 GRAIN>
struct Grain;

template <>
struct Grain<16> {
  u64 word[2];
  __device__ __forceinline__ void load(u64 from) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(word[0]), "=l"(word[1]) : "l"(from));
  }
  __device__ __forceinline__ void store(u64 to) const {
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(word[0]), "l"(word[1]) : "memory");
  }
};

template <>
struct Grain<8> {
  u64 word[1];
  __device__ __forceinline__ void load(u64 from) {
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word[0]) : "l"(from));
  }
  __device__ __forceinline__ void store(u64 to) const {
    asm volatile("st.global.u64 [%0], %1;" ::"l"(to), "l"(word[0]) : "memory");
  }
};

template <>
struct Grain<4> {
  u32 part;
  __device__ __forceinline__ void load(u64 from) {
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(part) : "l"(from));
  }
  __device__ __forceinline__ void store(u64 to) const {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(part) : "memory");
  }
};

template <>
struct Grain<1> {
  u32 part;
  __device__ __forceinline__ void load(u64 from) {
    asm volatile("ld.relaxed.sys.global.u8 %0, [%1];" : "=r"(part) : "l"(from));
  }
  __device__ __forceinline__ void store(u64 to) const {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(to), "r"(part) : "memory");
  }
};

// ---- mix64-v2, as in kvsdk/kernels/digest.py

__device__ __forceinline__ u64 splitmix64(u64 x) {
  u64 z = x + GOLDEN;
  z = (z ^ (z >> 30)) * C1;
  z = (z ^ (z >> 27)) * C2;
  return z ^ (z >> 31);
}

// 64 bits of a page, two words, times their keys. `index` counts the 64 bits.
__device__ __forceinline__ u64 keyed(u64 words, u32 index) {
  const u64 i = 2ull * index;
  return (words & 0xFFFFFFFFull) * (splitmix64(i) | 1) + (words >> 32) * (splitmix64(i + 1) | 1);
}

__device__ __forceinline__ u64 sum_over_warp(u64 value) {
#pragma unroll
  for (u32 offset = WARP / 2; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// ---- units

// One block's page of one layer, on both sides. Without COPY there is no destination.
template <bool COPY, bool MANY_RUNS>
struct Page {
  u64 src, dst;
  const Run* runs;
  u32 run_bytes;

  __device__ __forceinline__ void find(u32 at, u64& from, u64& to) const {
    if (MANY_RUNS) {
      const u32 run = at / run_bytes;
      const u32 within = at - run * run_bytes;
      from = src + runs[run].src + within;
      if (COPY) to = dst + runs[run].dst + within;
    } else {
      from = src + at;
      if (COPY) to = dst + at;
    }
  }
};

// UNROLL grains of this lane, from payload byte `first` on, one every WARP grains; returns the sum of their words times keys.
// Where all of them lie before `end`, nothing branches: the loads go out together and the multiplications interleave.
template <u32 GRAIN, bool COPY, bool DIGEST, bool ALL, bool MANY_RUNS>
__device__ __forceinline__ u64 tile(const Page<COPY, MANY_RUNS>& page, u32 first, u32 end) {
  Grain<GRAIN> grains[UNROLL];
  u64 from[UNROLL], to[UNROLL], sum = 0;
#pragma unroll
  for (u32 i = 0; i < UNROLL; i++) {
    const u32 at = first + i * WARP * GRAIN;
    if (ALL || at < end) page.find(at, from[i], to[i]);
  }
#pragma unroll
  for (u32 i = 0; i < UNROLL; i++) {
    if (ALL || first + i * WARP * GRAIN < end) grains[i].load(from[i]);
  }
#pragma unroll
  for (u32 i = 0; i < UNROLL; i++) {
    const u32 at = first + i * WARP * GRAIN;
    if (ALL || at < end) {
      if (COPY) grains[i].store(to[i]);
      if (DIGEST) {
#pragma unroll
        for (u32 j = 0; j < GRAIN / 8; j++) sum += keyed(grains[i].word[j], at / 8 + j);
      }
    }
  }
  return sum;
}

// Payload bytes [begin, end) of a page by one warp; returns this lane's sum.
template <u32 GRAIN, bool COPY, bool DIGEST, bool MANY_RUNS>
__device__ __forceinline__ u64 whole_words(const Page<COPY, MANY_RUNS>& page, u32 begin, u32 end, u32 lane) {
  constexpr u32 TILE = UNROLL * WARP * GRAIN;
  u64 sum = 0;
  for (; begin + TILE <= end; begin += TILE) {
    sum += tile<GRAIN, COPY, DIGEST, true>(page, begin + lane * GRAIN, end);
  }
  if (begin < end) sum += tile<GRAIN, COPY, DIGEST, false>(page, begin + lane * GRAIN, end);
  return sum;
}

// The same where something is not aligned to 8 bytes: a lane puts each word together from its parts. Slow, and only for
// pages of odd sizes.
template <u32 GRAIN, bool COPY, bool DIGEST>
__device__ __forceinline__ u64 parts_of_words(const Page<COPY, true>& page, u32 begin, u32 end, u32 lane) {
  u64 sum = 0;
  for (u32 first = begin + lane * 8; first < end; first += WARP * 8) {
    u64 word = 0;
#pragma unroll
    for (u32 i = 0; i < 8 / GRAIN; i++) {
      const u32 at = first + i * GRAIN;
      if (at < end) {
        Grain<GRAIN> grain;
        u64 from, to;
        page.find(at, from, to);
        grain.load(from);
        if (COPY) grain.store(to);
        word |= static_cast<u64>(grain.part) << (8 * GRAIN * i);
      }
    }
    if (DIGEST) sum += keyed(word, first / 8);
  }
  return sum;
}

template <u32 GRAIN, bool COPY, bool DIGEST>
__device__ __forceinline__ void all_units(const Copy& copy, const int* dst_ids) {
  const u32 lane = threadIdx.x % WARP;
  const u32 num_warps = gridDim.x * (THREADS / WARP);
  const u32 num_units = (copy.num_blocks * copy.num_chunks) << copy.split;
  const u32 unit_bytes = CHUNK_BYTES >> copy.split;
  for (u32 unit = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; unit < num_units; unit += num_warps) {
    const u32 part = unit & ((1u << copy.split) - 1);
    const u32 nth_chunk = (unit >> copy.split) / copy.num_blocks;
    const u32 block = (unit >> copy.split) - nth_chunk * copy.num_blocks;
    if (copy.skip && copy.skip[block]) continue;
    const Chunk chunk = copy.chunks[nth_chunk];
    const Layer layer = copy.layers[chunk.layer];
    const u32 begin = chunk.first_byte + part * unit_bytes;
    const u32 end = min(begin + unit_bytes, layer.page_bytes);
    if (begin >= end) continue;
    const u64 src_id = copy.src_ids ? copy.src_ids[block] : block;
    const u64 src = copy.src_bases[chunk.layer] + src_id * layer.src_stride;
    u64 dst = 0;
    if (COPY) {
      const u64 dst_id = dst_ids ? dst_ids[block] : block;
      dst = copy.dst_bases[chunk.layer] + dst_id * layer.dst_stride;
    }
    const Run* runs = copy.runs + layer.first_run;
    u64 sum;
    if constexpr (GRAIN < 8) {
      const Page<COPY, true> page = {src, dst, runs, layer.run_bytes};
      sum = parts_of_words<GRAIN, COPY, DIGEST>(page, begin, end, lane);
    } else if (layer.num_runs == 1) {
      const Page<COPY, false> page = {src + runs->src, COPY ? dst + runs->dst : 0, runs, layer.run_bytes};
      sum = whole_words<GRAIN, COPY, DIGEST>(page, begin, end, lane);
    } else {
      const Page<COPY, true> page = {src, dst, runs, layer.run_bytes};
      sum = whole_words<GRAIN, COPY, DIGEST>(page, begin, end, lane);
    }
    if (DIGEST) {
      sum = sum_over_warp(sum);
      if (lane == 0) atomicAdd(&copy.sums[static_cast<u64>(chunk.layer) * copy.num_blocks + block], sum);
    }
  }
}

// ---- kernels: any number of thread blocks of THREADS threads

// copy_blocks_<grain>: a plan carried out. copy_digest_blocks_<grain>: the same, and the sums of the source's words in
// the source's order. digest_blocks_<grain>: the sums alone. Every address, stride and run is a multiple of the grain.
#define KERNELS(GRAIN)                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks_##GRAIN(const __grid_constant__ Copy copy) {   \
    all_units<GRAIN, true, false>(copy, copy.dst_ids);                                                             \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
      copy_digest_blocks_##GRAIN(const __grid_constant__ Copy copy) {                                              \
    all_units<GRAIN, true, true>(copy, copy.dst_ids);                                                              \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS) digest_blocks_##GRAIN(const __grid_constant__ Copy copy) { \
    all_units<GRAIN, false, true>(copy, copy.dst_ids);                                                             \
  }

KERNELS(16)
KERNELS(8)
KERNELS(4)
KERNELS(1)

// copy_digest_blocks_16 with the destinations' ids beside the arguments.
extern "C" __global__ void __launch_bounds__(THREADS) copy_digest_listed(const __grid_constant__ Listed listed) {
  all_units<16, true, true>(listed.copy, listed.dst_ids);
}

// Sums to digests, compared with what they should be. A warp for each block, its lanes over the layers.
extern "C" __global__ void __launch_bounds__(THREADS) finish_digests(const __grid_constant__ Finish finish) {
  const u32 lane = threadIdx.x % WARP;
  const u32 num_warps = gridDim.x * (THREADS / WARP);
  const u32 n = finish.num_blocks;
  for (u32 block = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; block < n; block += num_warps) {
    const u64 place = splitmix64(finish.positions[block]);
    u64 digest = 0;
    for (u32 layer = lane; layer < finish.num_layers; layer += WARP) {
      const u64 seed = splitmix64(layer * GOLDEN + LAYER_SEED + place);
      u64& sum = finish.sums[static_cast<u64>(layer) * n + block];
      digest += splitmix64(sum ^ seed);
      sum = 0;
    }
    digest = sum_over_warp(digest);
    if (lane == 0) {
      const u8 wrong = finish.expected && finish.expected[block] != digest;
      if (finish.digests) finish.digests[block] = digest;
      if (finish.wrong) finish.wrong[block] = wrong;
      if (finish.wrong_too) finish.wrong_too[block] = wrong;
    }
  }
}
