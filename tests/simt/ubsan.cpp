// What -fsanitize=alignment,bounds calls in the plain build: a mistake ends the launch, with its line. The other builds
// link the sanitizer's own library instead.
#if !defined(__SANITIZE_ADDRESS__) && !defined(SIMT_TSAN)
#include "simt.h"

namespace {

struct Place {  // the first member of what the compiler passes
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  Place place;
  const void* type;
  unsigned char log_alignment, kind;
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t pointer) {
  simt::fail("misaligned access at %s:%u: address ends in %x, expected a multiple of %d", data->place.file,
             data->place.line, static_cast<unsigned>(pointer & 0xff), 1 << data->log_alignment);
}

void __ubsan_handle_out_of_bounds_abort(Place* place, uintptr_t index) {
  simt::fail("index %lld of a local array is out of its bounds at %s:%u", static_cast<long long>(index), place->file,
             place->line);
}

}  // extern "C"
#endif
