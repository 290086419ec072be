-- All clients, by name, without their secrets.
select id as client_id, array_to_string(scopes, ' ') as scope, projects, name, created_at
from clients
order by name
