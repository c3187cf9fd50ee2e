#include "proto/model/gguf.h"
#include "tests/golden/gguf_builder.h"
#include <stdio.h>
int main(int c,char**v){GgufBuilderConfig k;gguf_builder_defaults(&k);k.width=256;k.head_size=64;k.ffn_width=512;GError*e=NULL;
Dtype ts[]={0,1,2,3,6,7,8,12,13,14,30};
for(int i=0;i<11;i++){gguf_builder_set_type(&k,ts[i]);char p[100];sprintf(p,"/tmp/plan-tiny-%d.gguf",ts[i]);gguf_builder_write(&k,p,&e);if(e)puts(e->message);
g_autoptr(Gguf) g=gguf_open(p,&e);if(!g){puts(e->message);return 1;}
g_autoptr(ModelSpec)s=gguf_model_spec(g,&e);if(!s){puts(e->message);return 1;}printf("%s %u/%u\n",p,s->n_attn_units,s->n_ffn_units);}}
