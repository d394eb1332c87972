// Products of a few or many rows with a weight matrix, on a CPU: the plain C interface.
//
// A matrix is (out, in), as checkpoints store it, and stays in the dtype it is stored in.

#ifndef PUNA_KERNELS_H_
#define PUNA_KERNELS_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How numbers are stored. The names in Python are in puna/backend/kernels/library.py.
enum {
  PUNA_F32 = 0,
  PUNA_BF16 = 1,
  PUNA_F16 = 2,
  PUNA_I8 = 3,  // a weight is scale * q, or scale * q + low
  PUNA_U4 = 4,  // two to a byte, the lower half first: scale * (q - 8), or scale * q + low
  PUNA_F8 = 5,  // e4m3, a weight is scale * q; one scale for all inputs, and no infinity or NaN
};

typedef struct {
  const void* data;   // [out, in], or [out, ceil(in / 2)] bytes for PUNA_U4
  const void* scale;  // [out, ceil(in / group)]; NULL for the floats
  const void* low;    // like scale, or NULL
  int64_t out;
  int64_t in;
  int64_t group;       // inputs that share a scale: a multiple of 32, or all of them
  int32_t kind;        // of data
  int32_t scale_kind;  // of scale and low: one of the floats
} PunaMatrix;

// Runs `task(data)` on this thread and on up to `helpers` others, and returns when all are done.
typedef void (*PunaRun)(void* context, int helpers, void (*task)(void*), void* data);

typedef struct {
  PunaRun run;  // NULL means threads of our own
  void* context;
  int threads;
} PunaThreads;

// y[m] [rows, out] = x [rows, in] times the transpose of each matrix m. With `gated` there are two
// matrices and one result, silu(x times the first) * (x times the second).
// Returns NULL, or what is wrong with the arguments.
const char* puna_linear(const PunaThreads* threads, const void* x, int32_t x_kind, int64_t rows,
                        const PunaMatrix* matrices, int32_t count, void* const* y, int32_t y_kind,
                        int32_t gated);

// x [rows, in] = y [rows, out] times the matrix: the gradient of `puna_linear` by x.
const char* puna_linear_transposed(const PunaThreads* threads, const void* y, int32_t y_kind,
                                   int64_t rows, const PunaMatrix* matrix, void* x,
                                   int32_t x_kind);

// New tokens of several rows, and the cache they join. Their queries and keys are turned by cosines
// and sines; query head n looks at key head n / (query_heads / key_heads), at its own place and all
// before it. head_size is a multiple of 16.
typedef struct {
  const void* query;      // [rows, tokens, query_heads, head_size]
  const void* key;        // [rows, tokens, key_heads, head_size]
  const void* value;      // like key
  const float* cos;       // [rows, tokens, head_size]
  const float* sin;       // like cos: what the feature half a head further is multiplied by
  const int32_t* starts;  // [rows], the place of each row's first new token
  void* keys;             // [rows, key_heads, capacity, head_size], written to
  void* values;           // like keys
  void* out;              // like query
  int64_t rows, tokens, query_heads, key_heads, head_size, capacity;
  float scale;
  int32_t kind;        // of query, key, value and out
  int32_t cache_kind;  // of keys and values
} PunaAttention;

const char* puna_attention(const PunaThreads* threads, const PunaAttention* attention);

// All tokens of several rows at once. Query head n looks at key head n / (query_heads / key_heads), and
// token t of a row at its places [firsts, lasts); one that looks at none gets zeros.
typedef struct {
  const void* query;        // [rows, query_heads, tokens, head_size]
  const void* key;          // [rows, key_heads, places, head_size]
  const void* value;        // like key
  const int32_t* firsts;    // [rows, tokens]
  const int32_t* lasts;     // like firsts
  void* out;                // like query
  float* log_sums;          // [rows, query_heads, tokens], which the gradients need
  const void* out_change;   // like out; NULL where no gradients are wanted, as these are then:
  void* query_change;       // like query
  void* key_change;         // like key
  void* value_change;       // like value
  int64_t rows, tokens, query_heads, key_heads, head_size, places;
  float scale;
  int32_t kind;  // of all but log_sums
} PunaFullAttention;

// Fills out and log_sums.
const char* puna_full_attention(const PunaThreads* threads, const PunaFullAttention* attention);

// Fills the changes of query, key and value.
const char* puna_full_attention_back(const PunaThreads* threads, const PunaFullAttention* attention);

// A block of a Llama: its norms and matrices, and the cache that its new keys and values join.
typedef struct {
  const void* attention_norm;  // [width]
  const void* mlp_norm;        // [width]
  PunaMatrix query, key, value, out, gate, up, down;
} PunaBlock;

// A few new tokens on their way through blocks, one after another; see PunaAttention.
typedef struct {
  const PunaBlock* blocks;
  void* const* keys;    // of each block, [rows, key_heads, capacity, head_size]
  void* const* values;  // like keys
  void* x;              // [rows, tokens, width]; what comes out of the last block replaces it
  const float* cos;
  const float* sin;
  const int32_t* starts;
  int64_t count, rows, tokens, width, query_heads, key_heads, head_size, capacity;
  float scale, epsilon;
  int32_t kind;       // of x, and of all between
  int32_t norm_kind;  // of the norms' weights
  int32_t cache_kind;
} PunaBlocks;

// At most 8 tokens in all. Each result of a matrix, a norm or an attention is rounded to `kind`, as
// where they are called by themselves.
const char* puna_blocks(const PunaThreads* threads, const PunaBlocks* blocks);

// y [rows, width] = x over the root of its mean square and `epsilon`, times the weight [width]. x
// and y are of one kind.
void puna_rms_norm(const PunaThreads* threads, const void* x, int32_t kind, const void* weight,
                   int32_t weight_kind, float epsilon, int64_t rows, int64_t width, void* y);

// What y's change asks of x; both changes are of the kind of x.
void puna_rms_norm_back(const PunaThreads* threads, const void* x, int32_t kind,
                        const void* weight, int32_t weight_kind, float epsilon, int64_t rows,
                        int64_t width, const void* y_change, void* x_change);

// The changes of gate and up that a change of silu(gate) * up asks for; all are of one kind.
const char* puna_gate_back(const PunaThreads* threads, const void* gate, const void* up,
                           const void* change, int32_t kind, int64_t count, void* gate_change,
                           void* up_change);

// losses [rows] = the cross-entropy of logits [rows, width] and labels [rows], times weights [rows];
// highest [rows] are the greatest logits. With `gradient`, the logits become the losses' gradients;
// else they are lost. What is no number makes a row's loss, gradients and greatest logit such.
const char* puna_cross_entropy(const PunaThreads* threads, float* logits, int64_t rows,
                               int64_t width, const int64_t* labels, const float* weights,
                               int32_t gradient, float* losses, float* highest);

// Every byte is read, by all threads: what the memory gives. The result depends on all of them.
uint64_t puna_read(const PunaThreads* threads, const void* data, int64_t bytes);

// Which instructions are used: "avx512bf16", "avx512", "avx2" or "portable".
const char* puna_instructions(void);

// Use these instead, from the next call on. Returns 0 where this machine lacks them.
int puna_use_instructions(const char* name);

// `GOMP_parallel` of a program that has an OpenMP of its own, so that its threads are used. Its
// `context` is that function.
void puna_run_gomp(void* context, int helpers, void (*task)(void*), void* data);

#ifdef __cplusplus
}
#endif

#endif  // PUNA_KERNELS_H_
