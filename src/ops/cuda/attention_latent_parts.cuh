// What the kernels of latent attention share (values are the first columns of the key rows, ADR
// 0008): how a batch becomes items of 64 rows, and how key blocks come to shared memory in panels
// of 64 columns.
#pragma once

#include "ops/cuda/attention_panels.cuh"
#include "ops/cuda/gemm_ring.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kLatentRows = 64;   // rows of a tile: query heads of one KV head
inline constexpr int kLatentPanels = 9;  // of 64 columns: key widths up to 576
inline constexpr int kKeyPanelBytes = kBlock * 128;
inline constexpr int kRowPanelBytes = kLatentRows * 128;
inline constexpr int kLatentThreads = 384;    // two warpgroups that multiply, one that loads
inline constexpr int kLoadRows = kBlock / 4;  // of a block, each warp that loads

// Sizes that the launch fixes. `piece`: rows that lie side by side in the cache, a box of the map;
// below 8 the copy engine cannot bring them.
struct LatentShape {
  int head_tiles, panels, piece;
  int tokens;          // of a tile; several only where all heads of each are in it
  int fewest_queries;  // sequences of fewer are another kernel's
  std::int64_t tiles;  // of all sequences, as if each had the most queries
};

// Rows of q, one behind the other: query heads from `head` on of KV head j, of one token or of
// several. Row r belongs to token `token` + i with i = index(r) and sees the keys [0, first_end +
// i); those of the last one are [0, end).
struct LatentTile {
  Sequence seq;
  int s = 0, j = 0, head = 0, rows = 0, first_end = 0, end = 0, group = 1;
  std::int64_t token = 0;

  __device__ int index(int row) const { return row / group; }

  // Tiles of the last tokens come first: they have the most keys. False: nobody's.
  __device__ bool locate(const AttentionArgs& a, const LatentShape& n, std::int64_t tile) {
    group = static_cast<int>(a.heads / a.kv_heads);
    const int head_tile = static_cast<int>(tile % n.head_tiles);
    tile /= n.head_tiles;
    j = static_cast<int>(tile % a.kv_heads);
    tile /= a.kv_heads;
    s = static_cast<int>(tile % a.sequences);
    seq = Sequence(a, s);
    const auto behind = static_cast<int>(tile / a.sequences) * n.tokens;  // tokens behind these
    if (behind >= seq.queries || seq.queries < n.fewest_queries) return false;
    const int tokens = min(n.tokens, seq.queries - behind);
    token = seq.begin + seq.queries - behind - tokens;
    end = seq.keys - behind;
    first_end = end - tokens + 1;
    head = j * group + head_tile * kLatentRows;
    rows = n.tokens > 1 ? tokens * group : min(kLatentRows, group - head_tile * kLatentRows);
    return true;
  }
};

// Where the copy engine finds this lane's piece of the 32 keys that warp `warp` brings of the block
// from `first` on: a row of the cache. Absent ones are behind its end, where it brings zeros.
__device__ inline int piece_row(const AttentionArgs& a, const LatentTile& tile, int first, int warp,
                                int piece) {
  const int lane = static_cast<int>(threadIdx.x) % 32, at = lane * piece;
  if (at >= kLoadRows) return -kBlock;
  const int row = key_row(a, tile.seq, tile.s, first + warp * kLoadRows + at, tile.end);
  return row < 0 ? -kBlock : row;
}

// The part of a warp in bringing one panel of the keys [first, first + 128) of a sequence: 32 rows.
// `copied`: by the copy engine from `from`, see piece_row, with anything in the place of absent
// ones behind the first of a piece. Else copies of 16 bytes, zeros from the tile's end on; the
// barrier is then told by the caller.
__device__ inline void load_key_panel(const AttentionArgs& a, const LatentTile& tile, int first,
                                      int panel, std::uint32_t to, int warp, int piece, bool copied,
                                      int from, const CUtensorMap* map, std::uint32_t full) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint32_t mine = to + static_cast<std::uint32_t>(warp * kLoadRows * 128);
  if (copied) {
    if (lane == 0) mbarrier_arrive_expect(full, kLoadRows * 128);
    __syncwarp();
    const int at = lane * piece;
    if (at < kLoadRows)
      tma_load_3d(mine + static_cast<std::uint32_t>(at * 128), map, full, panel * 64, tile.j, from);
    return;
  }
  const int chunk = lane % 8, column = panel * 64 + chunk * 8;
#pragma unroll 4
  for (int r = lane / 8; r < kLoadRows; r += 4) {
    const int row = key_row(a, tile.seq, tile.s, first + warp * kLoadRows + r, tile.end);
    const bool present = row >= 0 && column < a.width;
    copy_async(panel_at<kKeyPanelBytes>(mine, r, chunk),
               a.k + (present ? (std::int64_t{row} * a.kv_heads + tile.j) * a.width + column : 0),
               present);
  }
}

// Rows [begin, 128) of a panel to zero, by kThreads threads of which this is number `thread`: what
// the copy engine brought behind the keys may hold anything. Then they synchronise.
template <int kThreads>
__device__ inline void clear_keys(std::uint32_t panel, int begin, int thread) {
  for (int r = begin + thread / 8; r < kBlock; r += kThreads / 8)
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                     panel + static_cast<std::uint32_t>(r * 128 + thread % 8 * 16)),
                 "r"(0)
                 : "memory");
}

// [rows, columns] of 16 bits as the left operand of m64k16 steps: the address of what this lane
// loads or stores of 16 columns, for load_matrix_x4 and store_matrix_x4. Panels of 64 columns.
__device__ inline std::uint32_t operand_at(std::uint32_t base, int warp, int lane, int step) {
  return panel_at<kRowPanelBytes>(base + static_cast<std::uint32_t>(warp * 16 * 128), lane % 16,
                                  step * 2 + lane / 16);
}

// Values that are not finite at keys which only the later tokens of a tile see: 0 * NaN would reach
// the others. Such a value becomes 0, and its column remembers the first token that sees one:
// tokens from there on are NaN in that column.
struct LatentBroken {
  unsigned char* first;  // in shared memory, a byte a column

  __device__ void clear(int thread) const {
    if (thread < (kLatentPanels - 1) * 8)
      reinterpret_cast<uint2*>(first)[thread] = {0xFFFFFFFFu, 0xFFFFFFFFu};
  }
  // Keys [begin, end) of a block, of which token i sees those before `seen` + i. A thread takes the
  // eight columns that it cleared, keys ascending.
  __device__ void check(std::uint32_t keys, int begin, int end, int seen, int thread) const {
    if (thread >= (kLatentPanels - 1) * 8) return;
    const std::uint32_t panel = keys + static_cast<std::uint32_t>(thread / 8 * kKeyPanelBytes);
    for (int r = begin; r < end; ++r) {
      const std::uint32_t at = panel_at<kKeyPanelBytes>(panel, r, thread % 8);
      const uint4 x = load_shared_16(at);
      std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
      bool any = false;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        constexpr std::uint32_t kExponent = 0x7F80;
        const int shift = i % 2 * 16;
        if ((words[i / 2] >> shift & kExponent) != kExponent) continue;
        any = true;
        words[i / 2] &= ~(0xFFFFu << shift);
        if (first[thread * 8 + i] == 0xFF)
          first[thread * 8 + i] = static_cast<unsigned char>(r + 1 - seen);
      }
      if (any)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]),
                     "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    }
  }
  __device__ float value(float x, int token, int column) const {
    return token >= first[column] ? std::numeric_limits<float>::quiet_NaN() : x;
  }
};

}  // namespace lockstep::ops::cuda
