#include "kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#define FASTSN_ISA baseline
#define FASTSN_VECTOR_BYTES 16
#include "kernels_impl.h"
