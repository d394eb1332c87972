// The kernels as calls that a program compiled by XLA can make, on XLA's own threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "threads.h"
#include "xla_ffi.h"

namespace puna::xla {
namespace {

constexpr int kInvalidArgument = 3;

Error* refuse(const CallFrame* frame, const char* why) {
  ErrorCreateArgs args{sizeof args, nullptr, why, kInvalidArgument};
  return frame->api->error_create(&args);
}

// XLA asks, when a handler is registered, which version it was made for. What is used here has kept
// its place in all of 0.x.
bool answers_version(const CallFrame* frame) {
  if (frame->extension_start == nullptr || frame->extension_start->type != kMetadata) return false;
  auto* extension = reinterpret_cast<MetadataExtension*>(frame->extension_start);
  extension->metadata->api_version.major_version = frame->api->api_version.major_version;
  extension->metadata->api_version.minor_version = frame->api->api_version.minor_version;
  extension->metadata->traits = 0;
  return true;
}

// Work that XLA's threads may join. One that comes when all is done finds nothing to do, perhaps
// long after the call: so it holds the record, and only the record.
struct Shared {
  void (*task)(void*);
  void* data;
  std::atomic<int> inside{1};     // who works now, the caller included
  std::atomic<bool> over{false};  // no more may begin
};

void join(void* pointer) {
  std::unique_ptr<std::shared_ptr<Shared>> held(static_cast<std::shared_ptr<Shared>*>(pointer));
  Shared& shared = **held;
  shared.inside.fetch_add(1);
  if (!shared.over.load()) shared.task(shared.data);
  shared.inside.fetch_sub(1);
}

void run_on_xla(void* context, int helpers, void (*task)(void*), void* data) {
  const CallFrame* frame = static_cast<const CallFrame*>(context);
  auto shared = std::make_shared<Shared>();
  shared->task = task, shared->data = data;
  for (int i = 0; i < helpers; ++i) {
    auto held = std::make_unique<std::shared_ptr<Shared>>(shared);
    ScheduleArgs args{sizeof args, nullptr, frame->context, join, held.get()};
    if (frame->api->thread_pool_schedule(&args) != nullptr) break;  // no pool: the caller works
    held.release();
  }
  task(data);
  // All pieces are taken. Who has one is waited for; who comes from here on must not look.
  shared->over.store(true);
  shared->inside.fetch_sub(1);
  while (shared->inside.load() > 0) pause();
}

PunaThreads threads_of(const CallFrame* frame) {
  int64_t count = 1;
  NumThreadsArgs args{sizeof args, nullptr, frame->context, &count};
  if (frame->api->thread_pool_num_threads(&args) != nullptr) count = 1;
  return {run_on_xla, const_cast<CallFrame*>(frame), int(count)};
}

int32_t kind_of(const Buffer& buffer) {
  switch (buffer.dtype) {
    case kF32: return PUNA_F32;
    case kBF16: return PUNA_BF16;
    case kF16: return PUNA_F16;
    case kS8: return PUNA_I8;
    case kU8: return PUNA_U4;
    case kF8E4M3FN: return PUNA_F8;
    default: return -1;
  }
}

int64_t find(const CallFrame* frame, const char* name) {
  const Attributes& all = frame->attributes;
  for (int64_t i = 0; i < all.size; ++i)
    if (all.names[i]->size == std::strlen(name) &&
        std::memcmp(all.names[i]->data, name, all.names[i]->size) == 0)
      return i;
  return -1;
}

template <typename T>
T attribute(const CallFrame* frame, const char* name, DataType dtype) {
  int64_t at = find(frame, name);
  if (at < 0) return 0;
  const Scalar& scalar = *static_cast<const Scalar*>(frame->attributes.values[at]);
  return scalar.dtype == dtype ? *static_cast<const T*>(scalar.value) : T{};
}

int64_t attribute(const CallFrame* frame, const char* name) {
  return attribute<int64_t>(frame, name, kS64);
}

// Attribute `name`, an array of whole numbers; NULL where there is none of `size`.
const int64_t* numbers(const CallFrame* frame, const char* name, int64_t size) {
  int64_t at = find(frame, name);
  if (at < 0) return nullptr;
  const Array& array = *static_cast<const Array*>(frame->attributes.values[at]);
  return array.dtype == kS64 && array.size == size_t(size) ? static_cast<const int64_t*>(array.data)
                                                           : nullptr;
}

// A matrix from its buffers: data, and where it is quantized scale and perhaps low.
PunaMatrix matrix_of(Buffer** buffers, int64_t parts, int64_t in, int64_t group) {
  PunaMatrix m{};
  m.data = buffers[0]->data;
  m.out = buffers[0]->dims[0];
  m.in = in;
  m.kind = kind_of(*buffers[0]);
  m.group = group;
  if (parts > 1) m.scale = buffers[1]->data, m.scale_kind = kind_of(*buffers[1]);
  if (parts > 2) m.low = buffers[2]->data;
  return m;
}

int64_t rows_of(const Buffer& buffer) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < buffer.rank; ++i) rows *= buffer.dims[i];
  return rows;
}

constexpr int kMostMatrices = 8;

}  // namespace
}  // namespace puna::xla

using namespace puna::xla;

extern "C" {

// Arguments: x [..., in], and each matrix's `parts` buffers. Results: of each matrix [..., out].
void* puna_xla_linear(void* pointer) {
  const CallFrame* frame = static_cast<const CallFrame*>(pointer);
  if (answers_version(frame)) return nullptr;
  int64_t parts = attribute(frame, "parts"), group = attribute(frame, "group");
  int64_t gated = attribute(frame, "gated"), count = (frame->arguments.size - 1) / parts;
  if (count > kMostMatrices) return refuse(frame, "too many matrices for one call");
  const Buffer& x = *frame->arguments.buffers[0];
  PunaMatrix matrices[kMostMatrices];
  void* y[kMostMatrices];
  for (int64_t i = 0; i < count; ++i)
    matrices[i] =
        matrix_of(frame->arguments.buffers + 1 + i * parts, parts, x.dims[x.rank - 1], group);
  for (int64_t i = 0; i < frame->results.size; ++i) y[i] = frame->results.buffers[i]->data;
  PunaThreads threads = threads_of(frame);
  const char* why =
      puna_linear(&threads, x.data, kind_of(x), rows_of(x), matrices, int32_t(count), y,
                  kind_of(*frame->results.buffers[0]), int32_t(gated));
  return why == nullptr ? nullptr : refuse(frame, why);
}

// Arguments: y [..., out] and a matrix's buffers. Result: x [..., in].
void* puna_xla_linear_transposed(void* pointer) {
  const CallFrame* frame = static_cast<const CallFrame*>(pointer);
  if (answers_version(frame)) return nullptr;
  const Buffer &y = *frame->arguments.buffers[0], &x = *frame->results.buffers[0];
  PunaMatrix m = matrix_of(frame->arguments.buffers + 1, attribute(frame, "parts"),
                           x.dims[x.rank - 1], attribute(frame, "group"));
  PunaThreads threads = threads_of(frame);
  const char* why =
      puna_linear_transposed(&threads, y.data, kind_of(y), rows_of(y), &m, x.data, kind_of(x));
  return why == nullptr ? nullptr : refuse(frame, why);
}

// Arguments: query, key, value, cos, sin, starts, keys, values. Results: out [rows, tokens, query
// heads * head size], and keys and values, which are the arguments' memory.
void* puna_xla_attention(void* pointer) {
  const CallFrame* frame = static_cast<const CallFrame*>(pointer);
  if (answers_version(frame)) return nullptr;
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  PunaAttention a{};
  a.query = in[0]->data, a.key = in[1]->data, a.value = in[2]->data;
  a.cos = static_cast<const float*>(in[3]->data), a.sin = static_cast<const float*>(in[4]->data);
  a.starts = static_cast<const int32_t*>(in[5]->data);
  a.out = out[0]->data, a.keys = out[1]->data, a.values = out[2]->data;
  if (a.keys != in[6]->data || a.values != in[7]->data)
    return refuse(frame, "the cache was not given to be written to");
  const int64_t* dims = out[1]->dims;
  a.rows = dims[0], a.key_heads = dims[1], a.capacity = dims[2], a.head_size = dims[3];
  a.tokens = in[0]->dims[1], a.query_heads = in[0]->dims[2] / a.head_size;
  a.kind = kind_of(*in[0]);
  a.cache_kind = out[1]->dtype == kU16 ? int32_t{PUNA_BF16} : kind_of(*out[1]);
  a.scale = 1.0f / std::sqrt(float(a.head_size));
  PunaThreads threads = threads_of(frame);
  const char* why = puna_attention(&threads, &a);
  return why == nullptr ? nullptr : refuse(frame, why);
}

// Arguments: x [rows, tokens, width], cos, sin, starts, and of each block its two norms, the buffers
// of its seven matrices, keys and values. Results: x, and each block's keys and values, which are
// the arguments' memory. Attributes: of each matrix how many buffers it has, and its group.
void* puna_xla_blocks(void* pointer) {
  const CallFrame* frame = static_cast<const CallFrame*>(pointer);
  if (answers_version(frame)) return nullptr;
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  int64_t count = (frame->results.size - 1) / 2;
  const int64_t* parts = numbers(frame, "parts", 7 * count);
  const int64_t* groups = numbers(frame, "groups", 7 * count);
  if (count < 1 || parts == nullptr || groups == nullptr)
    return refuse(frame, "the blocks' matrices are not described");
  PunaBlocks all{};
  const Buffer& x = *in[0];
  all.count = count, all.rows = x.dims[0], all.tokens = x.dims[1], all.width = x.dims[2];
  all.cos = static_cast<const float*>(in[1]->data), all.sin = static_cast<const float*>(in[2]->data);
  all.starts = static_cast<const int32_t*>(in[3]->data);
  const int64_t* dims = out[1]->dims;
  all.key_heads = dims[1], all.capacity = dims[2], all.head_size = dims[3];
  all.kind = kind_of(x), all.norm_kind = kind_of(*in[4]);
  all.cache_kind = out[1]->dtype == kU16 ? int32_t{PUNA_BF16} : kind_of(*out[1]);
  all.scale = 1.0f / std::sqrt(float(all.head_size));
  all.epsilon = attribute<float>(frame, "epsilon", kF32);
  std::vector<PunaBlock> blocks(count);
  std::vector<void*> keys(count), values(count);
  Buffer** next = in + 4;
  for (int64_t i = 0; i < count; ++i, parts += 7, groups += 7) {
    PunaBlock& b = blocks[i];
    b.attention_norm = (*next++)->data;
    b.mlp_norm = (*next++)->data;
    PunaMatrix* matrices[] = {&b.query, &b.key, &b.value, &b.out, &b.gate, &b.up, &b.down};
    for (int j = 0; j < 7; ++j, next += parts[j - 1]) {
      // What a matrix takes in is what another gives.
      int64_t width = j == 3 ? b.query.out : j == 6 ? b.gate.out : all.width;
      *matrices[j] = matrix_of(next, parts[j], width, groups[j]);
    }
    keys[i] = out[1 + 2 * i]->data;
    values[i] = out[2 + 2 * i]->data;
    if (keys[i] != (*next++)->data || values[i] != (*next++)->data)
      return refuse(frame, "the cache was not given to be written to");
  }
  all.query_heads = blocks[0].query.out / all.head_size;
  all.blocks = blocks.data(), all.keys = keys.data(), all.values = values.data();
  all.x = out[0]->data;
  if (all.x != x.data) std::memcpy(all.x, x.data, rows_of(x) * all.width * (all.kind == PUNA_F32 ? 4 : 2));
  PunaThreads threads = threads_of(frame);
  const char* why = puna_blocks(&threads, &all);
  return why == nullptr ? nullptr : refuse(frame, why);
}

}  // extern "C"
