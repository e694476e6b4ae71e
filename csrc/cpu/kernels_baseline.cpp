#include "kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#define FASTSN_ISA baseline
#include "kernels_impl.h"
