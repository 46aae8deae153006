// The table between the backend and the code that is compiled once per instruction set. Everything here is plain data:
// the per-ISA objects include no standard C++ header, so no inline function compiled with wide instructions can become
// the copy that the linker keeps for the whole program (tests/python/test_isa_objects.py checks).
//
// Layout of packed weights, out dimension N in panels of 32 columns, the last one padded with zeros:
//   fp32  [N/32][K][32]
//   bf16  [N/32][K/32][2 tiles][16 k pairs][16 columns][2]     a tile is what TDPBF16PS takes as its B operand
//
// Weights in groups of G = 32, 64 or 128 adjacent k are codes without sign, 8 or 4 bits each, with fp16 scales:
//   symmetric     w = scale[n][k / G] * (code - zero), zero being one number for the whole weight
//   with offsets  w = scale[n][k / G] * code + offset[n][k / G]
// They are packed as [N/32][K/G] blocks of: codes, 32 fp16 scales and, only with offsets, 32 fp16 offsets. What a last
// group lacks is code 0. Codes lie in quads of adjacent k, as the product of bytes takes them:
//   8 bits  [2 tiles][G/4 quads of k][16 columns][4]
//   4 bits  [2 tiles][G/8 pairs of quads][16 columns][4]  low nibbles: quad 2 pair, high nibbles: the next one
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastllm::cpu {

inline constexpr int64_t kPanel = 32;       // weight columns of a panel
inline constexpr int64_t kGroup = 32;       // adjacent k of the smallest group that share a scale
inline constexpr int64_t kSpan = 128;       // adjacent k of the largest
inline constexpr int64_t kRowBlock = 32;    // activation rows of a prepared block
inline constexpr int64_t kKvTile = 64;      // KV positions of one softmax partial; anchored at position 0
inline constexpr int64_t kQueryBlock = 32;  // query tokens that share one pass over the KV tiles

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// out[m, n] = a w^T (+ bias), or out += ...
struct GemmArgs {
  const void* a;      // fp32 weights: fp32 rows; bf16 weights: what prepare_bf16() wrote
  int64_t lda;        // elements; fp32 rows only
  const void* w;      // packed
  int64_t m, n, k;    // true sizes
  const float* bias;  // [n] or null
  void* out;
  int64_t ldo;  // elements
  bool out_bf16, accumulate;
  float* sums;       // room for gemm_sums() floats of the calling thread; bf16 weights only
  const void* next;  // what this thread reads after these weights, as far as anyone knows, or null; up to 32 rows only
};

// Bytes of the block of one group of one panel, and of the codes at its start.
static constexpr int64_t quant_code_bytes(int bits, int64_t group) { return group * kPanel * bits / 8; }
static constexpr int64_t quant_block_bytes(int bits, int64_t group, bool offsets) {
  return quant_code_bytes(bits, group) + kPanel * (offsets ? 4 : 2);
}

// Adjacent k that share a step of the activations: those of a group, or half of the largest.
static constexpr int64_t quant_part(int64_t group) { return group < 64 ? group : 64; }

// The same product with grouped weights is made of integers within a part: activations are rounded to int8 by rows and
// parts,
//   absmax = max |x|;  xs = absmax / 127;  xq = round to even(x * (127 / absmax)), or 0 for absmax <= 1e-36
// With isum = sum code * xq and s = sum xq of a part, parts are added in ascending order and each operation rounds
// once, so all instruction sets and batches give the same bits:
//   symmetric     acc = fma(xs, scale * float(isum - zero * s), acc)
//   with offsets  acc = fma(xs, fma(offset, float(s), scale * float(isum)), acc)
struct QuantArgs {
  const void* a;    // what prepare_quant() wrote
  const void* w;    // packed
  int64_t m, n, k;  // true sizes
  int bits;         // of a code: 8 or 4
  int64_t group;    // adjacent k: 32, 64 or 128
  bool offsets;
  int zero;           // 0 with offsets
  const float* bias;  // [n] or null
  void* out;
  int64_t ldo;  // elements
  bool out_bf16, accumulate;
  float* sums;  // room for quant_sums() floats of the calling thread
};

// Rows on their way to codes.
struct QuantRows {
  const void* x;  // fp32 or bf16
  bool x_bf16;
  int64_t ldx, k;  // elements
  int64_t group;   // of the weight, as the next two
  bool offsets;
  int zero;
  const int32_t* order;  // [k]: number j of a row is x[order[j]]; null: x[j]
};

// Numbers of one row on their way to codes.
struct CodeChoice {
  const float* x;  // [n]
  int64_t n;
  int bits;        // of a code: 8 or 4
  int64_t group;   // adjacent k: 32, 64 or 128
  int zero;        // 0 with offsets
  uint8_t* codes;  // [n]
  float* scales;   // [ceil(n / group)], numbers of fp16
  float* offsets;  // the same; null: symmetric
};

struct NormArgs {
  const void* x;                // [rows, cols]
  const float* delta;           // fp32 [rows, cols] added to x first, x (fp32) being updated; or null
  void* out;                    // [rows, cols]
  int64_t ldx, ldd, ldo, cols;  // elements
  const float *weight, *bias;   // [cols] or null
  float eps;
  bool layer;  // subtract the mean
  bool x_bf16, out_bf16;
};

// How a cache keeps keys and values. I8: codes, and behind those of a block the fp32 scales of its positions.
enum class KvType : int { F32, BF16, F16, I8 };

// A block's keys and values of one head are rows, [block_size][head_dim], or, where attention multiplies pairs and rows
// would have to be turned for each query again, in pairs:
//   keys    [block_size/16][head_dim/2][16 positions][2 dims]
//   values  [block_size/2][head_dim][2 positions]
// block_size is a multiple of 16 then, and head_dim one of 32.
static constexpr bool kv_fits_pairs(KvType type, int block_size, int head_dim) {
  return type == KvType::BF16 && block_size % 16 == 0 && head_dim % 32 == 0;
}

struct RopeKvArgs {
  void* qkv;  // [tokens, (heads + 2 kv_heads) head_dim]
  int64_t ld;
  bool bf16;
  int heads, kv_heads, head_dim;
  const float *q_weight, *k_weight;  // [head_dim] or null
  float q_eps, k_eps;
  bool q_norm, k_norm, q_layer, k_layer;
  const float* cos_sin;  // [positions, rope_dim]
  int rope_dim;
  bool interleaved;
  void* kv;  // k of kv head 0, block 0
  KvType kv_type;
  int block_size;
  int64_t block_stride, kv_stride, head_stride;  // elements
  bool kv_pairs;                                 // the order of a block's keys and values
};

// One block of query tokens of one sequence against the cache of one kv head.
struct AttnTask {
  const void* q;  // first token, first head of the group
  void* out;
  int64_t q_stride, out_stride;  // elements between tokens
  bool bf16;
  int tokens, first_pos, group, head_dim;
  const void* kv;  // k of this kv head, block 0
  KvType kv_type;
  const int32_t* table;
  int block_size;
  int64_t block_stride, kv_stride;  // elements
  bool kv_pairs;                    // the order of a block's keys and values
  float scale, softcap;
  int window;
  const float* slopes;           // [group] or null
  int64_t tile_begin, tile_end;  // KV tiles of this task
  float* partials;               // [tile][partial_floats()], tile 0 first; null: finish in place
  const AttnTask* then;          // what this thread is likely to do next, or null: its first tiles are asked for
};

// Size of one softmax partial: weighted values, then maxima and sums. `queries` = group * tokens.
static constexpr int64_t partial_floats(int64_t queries, int64_t head_dim) {
  return queries * round_up(head_dim, 16) + 2 * round_up(queries, 16);
}

enum class Act : int { Silu, Gelu, GeluTanh, Relu };

// One row of logits on its way to a token. Only tokens with logit > floor, or == floor and id <= last_id, take part.
struct GumbelArgs {
  const float* logits;
  int64_t n;
  float inv_temperature;
  float floor;
  int64_t last_id;
  uint64_t seed, position;
};

struct Kernels {
  const char* name;
  bool amx;       // the bf16 product runs on tiles
  bool kv_pairs;  // attend() takes bf16 queries with a cache in pairs, where it fits

  // rows: [n <= 32, k] fp32; panel: one packed panel. tmp: round_up(k, 32) * 2 bytes.
  void (*pack_f32)(const float* rows, int64_t n, int64_t k, float* panel);
  void (*pack_bf16)(const float* rows, int64_t n, int64_t k, uint16_t* panel, uint16_t* tmp);
  // Bytes of one prepared block of kRowBlock rows, and its making from rows [begin, end) (begin: multiple of
  // kRowBlock).
  int64_t (*prepared_bytes)(int64_t k);
  void (*prepare_bf16)(const uint16_t* x, int64_t ldx, int64_t begin, int64_t end, int64_t k, void* prepared);
  // Rows [m0, m1) (m0: multiple of kRowBlock) times panels [p0, p1).
  void (*gemm_f32)(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  void (*gemm_bf16)(const GemmArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  int64_t (*gemm_sums)(int64_t rows, int64_t panels, int64_t k);  // of the rows and panels of one gemm_bf16()

  // The same for grouped weights.
  int64_t (*prepared_quant_bytes)(int64_t k);
  void (*prepare_quant)(const QuantRows& rows, int64_t begin, int64_t end, void* prepared);
  void (*gemm_quant)(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  // gemm_quant() without the instructions that only some machines of this level have.
  void (*gemm_quant_plain)(const QuantArgs& g, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  int64_t (*quant_sums)(int64_t rows, int64_t k, int64_t group);

  // False when a number, or a scale or offset as fp16, is not finite. The same for all instruction sets, bit for bit.
  bool (*choose_codes)(const CodeChoice& c);

  void (*norm)(const NormArgs& a, int64_t row0, int64_t row1);
  void (*add)(float* x, const float* y, int64_t n);
  void (*act)(void* x, bool bf16, int64_t n, Act act);
  void (*gated_act)(void* out, const void* gate, const void* up, bool bf16, int64_t n, Act act);
  void (*scale_softcap)(float* x, int64_t n, float scale, float softcap);
  // Token `token` of qkv stands at `pos`; its k and v go to slot `slot` of `block`. tmp: head_dim floats.
  void (*rope_kv)(const RopeKvArgs& a, int64_t token, int64_t pos, int64_t block, int64_t slot, float* tmp);

  int64_t (*attn_scratch)(int64_t queries, int64_t head_dim);  // floats
  void (*attend)(const AttnTask& t, float* scratch);
  void (*merge)(const AttnTask& t, float* scratch);  // partials of tiles [tile_begin, tile_end) into out

  float (*row_max)(const float* x, int64_t n);                             // NaN if any is
  int64_t (*argmax)(const float* x, int64_t n);                            // lowest on ties; -1: it is not finite
  double (*sum_exp)(const float* x, int64_t n, float shift, float scale);  // sum exp((x - shift) * scale)
  int64_t (*gumbel_argmax)(const GumbelArgs& a);
};

}  // namespace fastllm::cpu
