// As much of XLA's foreign function interface (C, version 0.x) as the handlers in xla.cpp use. It
// is written out so that building needs no jaxlib; tests/unit/test_kernels.py compares it with the
// header that jaxlib brings.

#ifndef PUNA_XLA_FFI_H_
#define PUNA_XLA_FFI_H_

#include <cstddef>
#include <cstdint>

namespace puna::xla {

enum DataType {
  kS8 = 2, kS32 = 4, kS64 = 5, kU8 = 6, kU16 = 7, kF16 = 10, kF32 = 11, kBF16 = 16, kF8E4M3FN = 20
};
enum Stage { kExecute = 3 };
enum Extension { kMetadata = 1 };

struct ExtensionBase {
  size_t struct_size;
  int32_t type;
  ExtensionBase* next;
};

struct Version {
  size_t struct_size;
  ExtensionBase* extension_start;
  int major_version;
  int minor_version;
};

struct Metadata {
  size_t struct_size;
  Version api_version;
  uint32_t traits;
};

struct MetadataExtension {
  ExtensionBase base;
  Metadata* metadata;
};

struct Buffer {
  size_t struct_size;
  ExtensionBase* extension_start;
  int32_t dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Buffers {  // of arguments and of results
  size_t struct_size;
  ExtensionBase* extension_start;
  int64_t size;
  int32_t* types;
  Buffer** buffers;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Scalar {
  int32_t dtype;
  void* value;
};

struct Array {
  int32_t dtype;
  size_t size;
  void* data;
};

struct Attributes {
  size_t struct_size;
  ExtensionBase* extension_start;
  int64_t size;
  int32_t* types;
  ByteSpan** names;
  void** values;
};

struct Error;
struct Context;

struct ErrorCreateArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  const char* message;
  int32_t code;
};

struct ScheduleArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  Context* context;
  void (*task)(void*);
  void* data;
};

struct NumThreadsArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  Context* context;
  int64_t* threads;
};

struct Api {
  size_t struct_size;
  ExtensionBase* extension_start;
  Version api_version;
  const void* internal_api;
  Error* (*error_create)(ErrorCreateArgs*);
  void* not_used_here[10];
  Error* (*thread_pool_schedule)(ScheduleArgs*);
  Error* (*thread_pool_num_threads)(NumThreadsArgs*);
};

struct CallFrame {
  size_t struct_size;
  ExtensionBase* extension_start;
  const Api* api;
  Context* context;
  int32_t stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

}  // namespace puna::xla

#endif  // PUNA_XLA_FFI_H_
