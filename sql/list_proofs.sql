-- The sealing keys that this database was used with.
select id
from sealing_keys
order by id
